"""`scripts/train.py`, but rank 1 kills itself behind the step that KILL_AT names, the first time."""

import os
import sys
from pathlib import Path

from tessera.ctr.train.engine import Engine
from tessera.scripts.train import main

train_step, marker = Engine.train_step, Path(os.environ["KILL_MARKER"])


def step_then_die(engine: Engine, batch):
    result = train_step(engine, batch)
    if engine.step == int(os.environ["KILL_AT"]) and engine.process.rank == 1 and not marker.exists():
        marker.write_text("")
        os.kill(os.getpid(), 9)
    return result


if __name__ == "__main__":
    Engine.train_step = step_then_die
    sys.exit(main())
