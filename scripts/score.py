"""Predict for rows without labels: `tessera score runs/mine --data /data/requests --output scores --keep request_id`.

Each file of the data becomes one of the same name, rows in the same order: the columns to keep, and `prediction`. The
same command goes on where it was stopped. On several ranks: `torchrun --nproc-per-node 2 -m tessera.scripts.score ...`.
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
    parser.add_argument("overrides", nargs="*", help="data.bad_rows=skip trainer.batch_size=8192")
    parser.add_argument(
        "--data", required=True, nargs="+", help="folders, files, patterns or URIs with the columns of the features"
    )
    parser.add_argument("--output", required=True, type=Path, help="a new folder, or that of the same command before")
    parser.add_argument("--keep", default="", metavar="A,B", help="columns that are copied beside the predictions")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_intermixed_args(arguments)
    let_idle_threads_sleep()  # before the imports below load torch

    from tessera.ctr.runs.score import run_config
    from tessera.ctr.runs.score_rows import score_rows
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = run_config(options.run_dir, options.overrides)
        return config, config.trainer.device, config.trainer.timeout_seconds

    def score(config: Config, process: Process) -> None:
        keep = [name for name in options.keep.split(",") if name]
        scored = score_rows(config, process, options.run_dir, options.data, options.output, keep)
        if process.is_main:
            print(scored.summary())

    return run(load, score)


if __name__ == "__main__":
    sys.exit(main())
