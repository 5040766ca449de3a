"""Rank the fields of a trained run: `tessera importance runs/mine --method permutation --split valid`.

Nothing is trained: permutation scores the split once more for each field, taylor and sfs take the gradient of its loss
to the fields' vectors. The result is a folder with importance.json and a page with a chart. Only
`--curve 5,10,20` trains: the run again, on its best 5, 10 and 20 fields.
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
    parser.add_argument("overrides", nargs="*", help="data.path=/data/new trainer.early_stop.metric=logloss")
    methods = ("permutation", "taylor", "sfs", "dropout", "lpfs", "autofield", "optfs")
    parser.add_argument("--method", choices=methods, default="permutation", help="the last four only with --curve")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="valid")
    parser.add_argument("--repeats", type=int, default=5, help="of permutation; 2 or more give an interval")
    parser.add_argument("--output", type=Path, help="default: importance/<method> in the run folder")
    parser.add_argument(
        "--curve", metavar="5,10,20", help="train the run again on the best so many fields; importance/<method>-curve"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_intermixed_args(arguments)
    let_idle_threads_sleep()  # before the imports below load torch

    from tessera.ctr.runs.score import run_config
    from tessera.ctr.selection.curve import counts_of, run_curve
    from tessera.ctr.selection.ranked_run import rank_run
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = run_config(options.run_dir, options.overrides)
        return config, config.trainer.device, config.trainer.timeout_seconds

    def rank(config: Config, process: Process) -> None:
        given = (options.split, options.repeats, options.output)
        if options.curve is not None:
            counts = counts_of(options.curve)
            folder, points = run_curve(config, process, options.run_dir, options.method, counts, *given)
            if process.is_main:
                print(f"{len(points)} runs on the best {options.curve} fields: {folder}")
            return
        folder, found = rank_run(config, process, options.run_dir, options.method, *given)
        if process.is_main:
            print(f"most important: {', '.join(one.name for one in found[:5])}; {folder}")

    return run(load, rank)


if __name__ == "__main__":
    sys.exit(main())
