"""Bring a copy of the published model up to date: `python scripts/apply_delta.py runs/mine/published served/model`.

The output is a whole model in the form of a run's best/ folder. Only the changes published since it was made are
applied to it; `latest` says which these are, and every file is checked before the output is replaced.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed.process import Process, run  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("published", type=Path, help="`published` in the folder of a run")
parser.add_argument("output", type=Path, help="the folder of the model, made or replaced")


def bring_up(options: argparse.Namespace, process: Process) -> None:
    from ctr.daily.publish import apply

    process.folder = str(options.output)
    print(apply(options.published, options.output, process))


if __name__ == "__main__":
    sys.exit(run(lambda: (parser.parse_args(), "cpu", 300.0), bring_up))
