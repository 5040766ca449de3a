"""Labels that come late: what was answered is kept until its label is known, and then written to the error memory."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch

from tessera.ctr.serving.error_memory import ErrorMemory

RESULTS = ("taken", "unknown", "repeated", "stale")


@dataclass(frozen=True)
class Waiting:
    """rows: whose labels are waited for, at most; seconds: how long for each."""

    rows: int = 1_000_000
    seconds: float = 86_400.0


@dataclass
class _Answered:
    """Rows of one request. waits: bool [n], whose labels have not come."""

    base: str
    at: float
    hidden: np.ndarray
    prediction: np.ndarray
    waits: np.ndarray


class Feedback:
    """Corrects what a model says, and learns from labels by the keys that went out with its answers. Any number of
    threads may call it."""

    def __init__(
        self,
        memory: ErrorMemory,
        folder: Path | None = None,
        waiting: Waiting | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """folder: where the memory is saved; None: nowhere."""
        self.memory, self._folder, self._waiting, self._clock = memory, folder, waiting or Waiting(), clock
        self._answered: OrderedDict[str, _Answered] = OrderedDict()
        self._rows = 0
        self._saved = (memory.base, memory.rows)
        self._begin, self._numbers = secrets.token_hex(4), count()
        self._lock = threading.Lock()
        self._saving = threading.Lock()

    def begin(self, base: str) -> bool:
        """Follow a model: the memory of another one is forgotten. Returns whether it was."""
        with self._lock:  # so that no label of the model before is written behind it
            if base == self.memory.base:
                return False
            self.memory.clear(base)
            return True

    def answer(self, base: str, prediction: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return the corrected probabilities of a request's rows and a key for each; `base` is of their model."""
        found = prediction
        if base == self.memory.base and len(prediction):
            found = self.memory.corrected(torch.from_numpy(hidden), torch.from_numpy(prediction)).numpy()
        token, rows = f"{self._begin}-{next(self._numbers):x}", len(prediction)
        with self._lock:
            if rows:
                waits = np.ones(rows, bool)
                self._answered[token] = _Answered(base, self._clock(), hidden.copy(), prediction.copy(), waits)
            self._rows += rows
            self._forget()
        return found, [f"{token}-{row}" for row in range(rows)]

    def _forget(self) -> None:
        """Give up the oldest answers: too many, or too old."""
        late = self._clock() - self._waiting.seconds
        while self._answered:
            oldest = next(iter(self._answered.values()))
            if self._rows <= self._waiting.rows and oldest.at >= late:
                return
            self._answered.popitem(last=False)
            self._rows -= len(oldest.waits)

    def take(self, labels: Sequence[tuple[str, int]]) -> dict[str, int]:
        """Write rows whose labels have come, by key. Returns how many were taken, of keys that nobody waits for
        (`unknown`), that came before (`repeated`), and of a model that is not served any more (`stale`)."""
        told = dict.fromkeys(RESULTS, 0)
        hidden, prediction, known = [], [], []
        with self._lock:
            self._forget()
            for key, label in labels:
                token, _, place = key.rpartition("-")
                one = self._answered.get(token)
                row = int(place) if place.isascii() and place.isdigit() and len(place) < 10 else -1
                if one is None or not 0 <= row < len(one.waits):
                    told["unknown"] += 1
                    continue
                if not one.waits[row]:
                    told["repeated"] += 1
                    continue
                one.waits[row] = False
                if one.base != self.memory.base:
                    told["stale"] += 1
                    continue
                told["taken"] += 1
                hidden.append(one.hidden[row])
                prediction.append(one.prediction[row])
                known.append(label)
            if known:
                rows = torch.from_numpy(np.stack(hidden)), torch.tensor(known), torch.tensor(np.array(prediction))
                self.memory.add(*rows)
        return told

    def save(self) -> None:
        """Write the memory to its folder, if there is one and anything is new. Raises OSError."""
        with self._saving:  # a server that stops saves while it may be saving
            now = (self.memory.base, self.memory.rows)
            if self._folder is not None and now != self._saved:
                self.memory.save(self._folder)
                self._saved = now
