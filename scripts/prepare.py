"""Make a data set that the trainer reads: from Criteo's, Avazu's or MovieLens' files, from any CSV, or
synthetic.

python scripts/prepare.py criteo --input train.txt.gz --output data/criteo
python scripts/prepare.py KIND --help
"""

import argparse
import sys

from tessera.ctr.data.convert.command import add_kinds, prepare
from tessera.distributed.process import run_alone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_kinds(parser)
    return run_alone(lambda: print(prepare(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())
