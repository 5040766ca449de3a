"""This rank's place in the job, and what it publishes of itself."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

AGAIN_SECONDS = 0.5  # two signals closer than this are one: launchers pass on what the terminal has sent already


class Terminated(BaseException):
    """Raised when SIGTERM arrives, or Ctrl-C for the second time: this rank ends at once."""


@dataclass
class Beat:
    """The status that a rank publishes. `seconds` is how long it has been at `stage`: hosts' clocks differ and may
    jump.

    broken: a collective has failed on it. pid, born and host tell its process.
    """

    at: float
    stage: str
    seconds: float
    broken: bool
    pid: int
    born: str
    host: str

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()


@dataclass
class Process:
    """This rank's place in the job. `stage` is free text ("step 120: backward") shown when the rank fails; `folder` is
    where the command writes, for the same purpose.

    With `can_stop_later` the first SIGTERM or Ctrl-C sets `stop_asked`, and whoever set it leaves by `Stopped` when the
    state is saved; without, and at the second one, the rank ends at once.

    Attributes:
        beats: the first sign of life of each other rank, which tells its process.
        broken: a collective has failed on this rank; it waited in vain.
        to_end: ranks that were found to stand still.
        beside: other ranks of this host that were running when a collective failed on this one; None before.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    store: dist.Store
    stage: str = "start"
    folder: str | None = None
    can_stop_later: bool = False
    stop_asked: bool = False
    stopped_by: str = "a signal to another rank"
    broken: bool = False
    beats: dict[int, Beat] = field(default_factory=dict)
    to_end: set[int] = field(default_factory=set)
    beside: set[int] | None = None
    _asked_at: float = 0.0
    _beat_stage: str | None = None  # at the last sign of life, and since when
    _beat_since: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_signal(self, number: int, _frame: object) -> None:
        if self.stop_asked and time.monotonic() - self._asked_at < AGAIN_SECONDS:
            return
        if not self.can_stop_later or self.stop_asked:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.stop_asked, self._asked_at = True, time.monotonic()
        self.stopped_by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if number == signal.SIGINT and self.is_main:
            os.write(2, b"stopping: the state is saved first; Ctrl-C once more ends at once\n")
