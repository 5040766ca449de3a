"""Retrain day by day: `tessera daily data=mine data.path=/data/mine trainer.run_dir=runs/mine daily.from=2026-01-01 \
daily.to=2026-01-14`. The same command goes on where it stopped. On several ranks: `torchrun --nproc-per-node 2 -m \
tessera.scripts.daily` with the same keys.

Exit status: 0 all is done, 2 a mistake in configuration or data, 3 the guard holds a day, 75 asked to stop and saved.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tessera.distributed.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from tessera.ctr.config import Config
    from tessera.distributed.rank import Process


def main(arguments: Sequence[str] | None = None) -> int:
    let_idle_threads_sleep()  # before the imports below load torch

    from tessera.ctr.config import load_config
    from tessera.ctr.daily.calendar import for_days
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = for_days(load_config(sys.argv[1:] if arguments is None else arguments, __doc__))
        return config, config.trainer.device, config.trainer.timeout_seconds

    return run(load, train)


def train(config: Config, process: Process) -> None:
    if config.daily.rollback_to is not None:
        from tessera.ctr.daily.rollback import roll_back

        roll_back(config, process, print)
    else:
        from tessera.ctr.daily.loop import Daily

        Daily(config, process).run()


if __name__ == "__main__":
    sys.exit(main())
