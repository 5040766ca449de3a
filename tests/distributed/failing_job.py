"""A job that fails in the way its first argument names, in step 20; run by test_process.py."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from tessera.distributed.process import Stopped, run
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError


def fail(how: str, process: Process) -> None:
    if how == "mistake_everywhere":
        raise ConfigError("key x is 7; expected 1")
    if how == "mistake_on_rank_1" and process.rank == 1:
        raise ConfigError("file f has column c twice")
    if how == "killed" and process.rank == 1:
        os.kill(os.getpid(), 9)
    if how == "hung" and process.rank == 1:
        process.stage = "step 20: reading"
        time.sleep(600)
    if how == "stopped" and process.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "first_rank_stopped" and process.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "bug" and process.rank == 1:
        raise ZeroDivisionError("a bug")


def until_stopped(process: Process) -> None:
    """As training does: in the same step all ranks learn that one of them was asked to stop."""
    process.can_stop_later = True
    print("ready", flush=True)
    while True:
        asked = torch.tensor(int(process.stop_asked))
        dist.all_reduce(asked)
        if asked:
            raise Stopped(line=f"stopped by {process.stopped_by}, state saved")
        time.sleep(0.05)


def main(how: str, process: Process) -> None:
    numbers = torch.ones(4)
    if how == "until_stopped":
        until_stopped(process)
    for step in range(40):
        process.stage = f"step {step}: sum"
        if step == 20:
            time.sleep(1.5)  # a heartbeat passes, so that the stage is known
            fail(how, process)
        dist.all_reduce(numbers)
    print(f"rank {process.rank} is done")


if __name__ == "__main__":
    sys.exit(run(lambda: (sys.argv[1], "cpu", 8.0), main))
