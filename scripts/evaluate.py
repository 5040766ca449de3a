"""Score a data set with a trained run: `tessera evaluate runs/mine --split test data.path=/data/new`.

The model is the best one of the run, or, where it keeps none, that of its newest saved state: a day of a run over
days is scored by `tessera evaluate runs/daily data.test=day=2026-01-14`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.distributed.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from tessera.ctr.config import Config
    from tessera.distributed.rank import Process


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", help="data.path=/data/new data.test=folder trainer.batch_size=8192")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test")
    parser.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="FEATURE",
        help="report metrics by value of this feature, too; new_ids: of rows with and without ids that have no row",
    )
    parser.add_argument("--output", type=Path, help="default: evaluations/<time> in the run folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_intermixed_args(arguments)
    let_idle_threads_sleep()  # before the imports below load torch

    from tessera.ctr.runs.score import run_config, score_run
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = run_config(options.run_dir, options.overrides)
        return config, config.trainer.device, config.trainer.timeout_seconds

    def evaluate(config: Config, process: Process) -> None:
        report = score_run(config, process, options.run_dir, options.split, options.output, options.slice)
        if report is not None:
            print(report.summary())

    return run(load, evaluate)


if __name__ == "__main__":
    sys.exit(main())
