"""Retrain day by day: `torchrun --nproc-per-node 2 scripts/daily.py data=mine data.path=/data/mine \
trainer.run_dir=runs/mine daily.from=2026-01-01 daily.to=2026-01-14`. The same command goes on where it stopped.

Exit status: 0 all is done, 2 a mistake in configuration or data, 3 the guard holds a day, 75 asked to stop and saved.
"""

import sys

from tessera.ctr.config import Config, load_config
from tessera.distributed.process import Process, run


def load() -> tuple[Config, str, float]:
    from tessera.ctr.daily.calendar import for_days

    config = for_days(load_config(sys.argv[1:], __doc__))
    return config, config.trainer.device, config.trainer.timeout_seconds


def train(config: Config, process: Process) -> None:
    if config.daily.rollback_to is not None:
        from tessera.ctr.daily.rollback import roll_back

        roll_back(config, process, print)
    else:
        from tessera.ctr.daily.loop import Daily

        Daily(config, process).run()


if __name__ == "__main__":
    sys.exit(run(load, train))
