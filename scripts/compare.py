"""Compare two runs on the rows that both scored: `tessera compare runs/old runs/new --split test`.

Says by how much the second run's AUC and logloss differ from the first's, with confidence intervals from a paired
bootstrap and from closed forms. Two folders of daily retraining are compared over all days that both scored.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tessera.ctr.report.comparison import PLACE, compare_runs
from tessera.distributed.process import run_alone


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="a run folder, or one that `tessera evaluate` wrote")
    parser.add_argument("second", type=Path, help="another")
    parser.add_argument("--split", help="default: test, valid or train, the first that both have")
    parser.add_argument("--label", default="", help="which of several labels; of a funnel also click_and_buy")
    parser.add_argument("--output", type=Path, help="default: comparisons/<name of the first> in the second")
    parser.add_argument("--replicates", type=int, default=1000, help="of the bootstrap; 0: closed forms only")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
    parser.add_argument("--by-group", action="store_true", help="draw groups (users) instead of rows")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not 0 < options.confidence < 1 or options.replicates < 0:
        parser.error("--confidence lies between 0 and 1, and --replicates is 0 or more")
    output = options.output or options.second / PLACE / options.first.resolve().name

    def compare() -> None:
        found = compare_runs(
            options.first,
            options.second,
            output,
            options.split,
            options.replicates,
            options.confidence,
            by_group=options.by_group,
            seed=options.seed,
            label=options.label,
        )
        print(found.summary())

    return run_alone(compare)


if __name__ == "__main__":
    sys.exit(main())
