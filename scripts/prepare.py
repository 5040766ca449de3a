"""Make a data set that the trainer reads: from Criteo's, Avazu's or MovieLens' files, from any CSV, or
synthetic.

tessera prepare criteo --input train.txt.gz --output data/criteo
tessera prepare KIND --help
"""

import argparse
import sys
from collections.abc import Sequence

from tessera.ctr.data.convert.command import add_kinds, prepare
from tessera.distributed.process import run_alone


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_kinds(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    return run_alone(lambda: print(prepare(make_parser().parse_args(arguments))))


if __name__ == "__main__":
    sys.exit(main())
