"""Write report.json and report.html of a run again: `python scripts/report.py RUN_DIR`."""

import argparse
import sys
from pathlib import Path

from tessera.ctr.report.report import write_report
from tessera.distributed.process import run_alone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run, with predictions/*.parquet")
    print(write_report(parser.parse_args().run_dir).summary())
    return 0


if __name__ == "__main__":
    sys.exit(run_alone(main))
