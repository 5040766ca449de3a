"""Rank the fields of a trained run: `tessera importance runs/mine --method permutation --split valid`.

Nothing is trained: permutation scores the split once more for each field, taylor and sfs take the gradient of its loss
to the fields' vectors. The result is a folder with importance.json and a page with a chart.
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
    parser.add_argument("--method", choices=("permutation", "taylor", "sfs"), default="permutation")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="valid")
    parser.add_argument("--repeats", type=int, default=5, help="of permutation; 2 or more give an interval")
    parser.add_argument("--output", type=Path, help="default: importance/<method> in the run folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_intermixed_args(arguments)
    let_idle_threads_sleep()  # before the imports below load torch

    from tessera.ctr.runs.score import run_config
    from tessera.ctr.selection.ranked_run import rank_run
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = run_config(options.run_dir, options.overrides)
        return config, config.trainer.device, config.trainer.timeout_seconds

    def rank(config: Config, process: Process) -> None:
        folder, found = rank_run(
            config, process, options.run_dir, options.method, options.split, options.repeats, options.output
        )
        if process.is_main:
            print(f"most important: {', '.join(one.name for one in found[:5])}; {folder}")

    return run(load, rank)


if __name__ == "__main__":
    sys.exit(main())
