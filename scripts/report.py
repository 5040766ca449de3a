"""Write report.json and report.html of a run again: `tessera report RUN_DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tessera.ctr.report.report import write_report
from tessera.distributed.process import run_alone


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run, with predictions/*.parquet")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    return run_alone(lambda: print(write_report(make_parser().parse_args(arguments).run_dir).summary()))


if __name__ == "__main__":
    sys.exit(main())
