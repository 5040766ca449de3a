"""Find learning rates before a run: `tessera find-lr --output rates/a model=deepfm data=criteo data.path=/data/criteo`

Trains a few hundred steps while the rate of the dense weights grows, then again while that of the rows does, and writes
both curves with a suggestion. Takes the keys of `tessera train`; no run folder is touched and no state is saved. On
several ranks: `torchrun --nproc-per-node 2 -m tessera.scripts.find_lr` with the same arguments. docs/tune.md says more.
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
    from tessera.ctr.config import config_parser

    parser = config_parser(__doc__ or "")
    parser.add_argument("--output", type=Path, required=True, help="folder of the curves")
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: %(default)s)")
    parser.add_argument("--low", type=float, default=1e-3, help="first rate beside the configured one (default: 0.001)")
    parser.add_argument("--high", type=float, default=1e3, help="last rate beside it (default: 1000)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    let_idle_threads_sleep()  # before the imports below load torch
    options = make_parser().parse_intermixed_args(arguments)

    from tessera.ctr.config import config_of
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = config_of(options)
        return config, config.trainer.device, config.trainer.timeout_seconds

    return run(load, lambda config, process: find(config, process, options))


def find(config: Config, process: Process, options: argparse.Namespace) -> None:
    """Write the curves to `options.output` and print what they suggest, on the first rank."""
    from tessera.ctr.output_folders import claim
    from tessera.ctr.report.find_lr_page import sentence, write_rates
    from tessera.ctr.train.find_lr import check, find_rates
    from tessera.distributed.collectives import on_first_rank

    check(config, options.steps, options.low, options.high)
    on_first_rank(process, lambda: claim(options.output, "--output", "find_lr.py", [config.data.path]))
    curves = find_rates(config, process, options.steps, options.low, options.high)
    on_first_rank(process, lambda: write_rates(options.output, curves))
    if process.is_main:
        for one in curves:
            print(sentence(one))
        print(f"report: {options.output}/report.html")


if __name__ == "__main__":
    sys.exit(main())
