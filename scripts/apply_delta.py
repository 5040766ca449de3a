"""Bring a copy of the published model up to date: `tessera apply-delta runs/mine/published served/model`.

The output is a whole model in the form of a run's best/ folder. Only the changes published since it was made are
applied to it; `latest` says which these are. Every file is checked, also where the output is up to date; a damaged one
is made anew from the last whole model. A folder that holds anything else than an earlier output is refused.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tessera.distributed.process import run
from tessera.distributed.rank import Process


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", help="`published` in the folder of a run, or its URI")
    parser.add_argument("output", type=Path, help="the folder of the model, made or replaced")
    parser.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="for another one on this output")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    return run(lambda: (make_parser().parse_args(arguments), "cpu", 300.0), bring_up)


def bring_up(options: argparse.Namespace, process: Process) -> None:
    from tessera.ctr.daily.serve import apply

    process.folder = str(options.output)
    print(apply(options.published, options.output, process, options.wait))


if __name__ == "__main__":
    sys.exit(main())
