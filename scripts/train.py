"""Train a model: `torchrun --nproc-per-node 2 scripts/train.py model=deepfm data=criteo data.path=/data/criteo`."""

import sys

from tessera.ctr.config import Config, load_config
from tessera.distributed.process import Process, run


def load() -> tuple[Config, str, float]:
    config = load_config(sys.argv[1:], __doc__)
    return config, config.trainer.device, config.trainer.timeout_seconds


def train(config: Config, process: Process) -> None:
    from tessera.ctr.train.trainer import Trainer

    Trainer(config, process).fit()


if __name__ == "__main__":
    sys.exit(run(load, train))
