"""Make a data set that the trainer reads: from Criteo's, Avazu's or MovieLens' files, from any CSV, or
synthetic.

python scripts/prepare.py criteo --input train.txt.gz --output data/criteo
python scripts/prepare.py KIND --help
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ctr.data.convert.command import add_kinds, prepare  # noqa: E402
from distributed.process import run_alone  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_kinds(parser)
    return run_alone(lambda: print(prepare(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())
