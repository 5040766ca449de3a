"""Predict for rows without labels: `tessera score runs/mine --data /data/requests --output scores --keep request_id`.

Each file of the data becomes one of the same name, rows in the same order: the columns to keep, and `prediction`. The
same command goes on where it was stopped. On several ranks: `torchrun --nproc-per-node 2 -m tessera.scripts.score ...`.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.distributed.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from tessera.ctr.config import Config
    from tessera.distributed.rank import Process

OVERRIDE = re.compile(r"(data|trainer)\.[a-z_.]+=")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", help="data.bad_rows=skip trainer.batch_size=8192")
    parser.add_argument(
        "--data", required=True, nargs="+", help="folders, files, patterns or URIs with the columns of the features"
    )
    parser.add_argument("--output", required=True, type=Path, help="a new folder, or that of the same command before")
    parser.add_argument(
        "--keep",
        default="",
        metavar="A,B",
        help="columns that are copied beside the predictions; a name with commas stands between double quotes",
    )
    parser.add_argument(
        "--memory", type=Path, help="folder of an error memory of the same model, which corrects the predictions"
    )
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; `data` without overrides that stand behind it, `keep` as a list of names."""
    options = make_parser().parse_intermixed_args(arguments)
    options.overrides += [one for one in options.data if OVERRIDE.match(one)]
    options.data = [one for one in options.data if not OVERRIDE.match(one)]
    options.keep = [name for line in csv.reader([options.keep]) for name in line if name]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    let_idle_threads_sleep()  # before the imports below load torch

    from tessera.ctr.runs.score_rows import config_to_score, score_rows
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = config_to_score(options.run_dir, options.overrides)
        return config, config.trainer.device, config.trainer.timeout_seconds

    def score(config: Config, process: Process) -> None:
        scored = score_rows(
            config, process, options.run_dir, options.data, options.output, options.keep, memory=options.memory
        )
        if process.is_main:
            print(scored.summary())

    return run(load, score)


if __name__ == "__main__":
    sys.exit(main())
