"""Plan a job before it runs: `tessera plan model=deepfm data=criteo data.path=/data/criteo --ranks 64 --device h100`

Prints rows and bytes of tables, bytes that ranks send by collective, and what a step takes on 1 to 1,024 ranks and why.
Takes the keys of `tessera train`, and reads some batches of the training rows, or statistics that were written before.
Times are estimates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tessera.ctr.config import config_of, config_parser
from tessera.distributed.process import run_alone, silence_torchrec
from tessera.distributed.threads import let_idle_threads_sleep


def make_parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__ or "")
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="the number of ranks that is shown by table and collective")
    add("--ranks-per-host", type=int, default=8, help="ranks of one host, which share a faster network")
    add("--device", default="cpu", help="numbers of a machine: cpu | a100 | h100 | h200")
    add("--set", action="append", default=[], metavar="KEY=NUMBER", help="own number of it: memory_gb_s=2800; see docs")
    add("--statistics", type=Path, help="a file of --write-statistics, instead of the data")
    add("--write-statistics", type=Path, metavar="FILE", help="write what was read of the data, a few kB a table")
    add("--batches", type=int, help="batches that are read; without it at least 8, and 65,536 rows")
    add("--samples", type=int, help="rows of tables after so many samples; without it those of the training split")
    add("--rows-per-rank", type=int, help="batches grow with the ranks; without it trainer.batch_size is shared out")
    add("--output", type=Path, metavar="FILE", help="a picture, .svg or .png")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    let_idle_threads_sleep()  # before torch is loaded
    options = make_parser().parse_intermixed_args(arguments)

    def work() -> None:
        silence_torchrec()  # before it is loaded
        from tessera.ctr.plan.command import PlanOptions, plan

        given = {name: value for name, value in vars(options).items() if name in PlanOptions.__dataclass_fields__}
        plan(config_of(options), PlanOptions(**given, numbers=tuple(options.set)))

    return run_alone(work)


if __name__ == "__main__":
    sys.exit(main())
