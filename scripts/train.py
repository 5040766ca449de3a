"""Train a model: `tessera train model=deepfm data=criteo data.path=/data/criteo`.

On several ranks: `torchrun --nproc-per-node 2 -m tessera.scripts.train` with the same keys.
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
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = load_config(sys.argv[1:] if arguments is None else arguments, __doc__)
        return config, config.trainer.device, config.trainer.timeout_seconds

    return run(load, train)


def train(config: Config, process: Process) -> None:
    from tessera.ctr.train.trainer import Trainer

    Trainer(config, process).fit()


if __name__ == "__main__":
    sys.exit(main())
