"""Train a model: `tessera train model=deepfm data=criteo data.path=/data/criteo`.

On several ranks: `torchrun --nproc-per-node 2 -m tessera.scripts.train` with the same keys.
"""

import sys
from collections.abc import Sequence

from tessera.ctr.config import Config, load_config
from tessera.distributed.process import run
from tessera.distributed.rank import Process


def main(arguments: Sequence[str] | None = None) -> int:
    def load() -> tuple[Config, str, float]:
        config = load_config(sys.argv[1:] if arguments is None else arguments, __doc__)
        return config, config.trainer.device, config.trainer.timeout_seconds

    return run(load, train)


def train(config: Config, process: Process) -> None:
    from tessera.ctr.train.trainer import Trainer

    Trainer(config, process).fit()


if __name__ == "__main__":
    sys.exit(main())
