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
from typing import IO

import numpy as np
import torch

from tessera.ctr.serving.answers import BLOCK_ROWS, Answer, Block, read_blocks, token_of, written_rows
from tessera.ctr.serving.error_memory import FILE, ErrorMemory
from tessera.ctr.serving.files import hold
from tessera.ctr.serving.tensor_files import remove_partial, sealed, write_whole

RESULTS = ("taken", "unknown", "repeated", "stale")


@dataclass(frozen=True)
class Waiting:
    """rows: whose labels are waited for, at most; seconds: how long for each."""

    rows: int = 1_000_000
    seconds: float = 86_400.0


class Feedback:
    """Corrects what a model says, and learns from labels by the keys that went out with its answers. Any number of
    threads may call it."""

    def __init__(
        self,
        memory: ErrorMemory,
        folder: Path | None = None,
        waiting: Waiting | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """folder: where the memory is saved, and what waits for labels; None: nowhere. What waits there is read.

        Raises ExportError: a file in the folder is damaged; OSError.
        """
        self.memory, self._folder, self._waiting, self._clock = memory, folder, waiting or Waiting(), clock
        self._answered: OrderedDict[str, tuple[Block, Answer]] = OrderedDict()
        self._blocks = [] if folder is None else read_blocks(folder, memory.written)
        for block in self._blocks:
            self._answered.update((answer.token, (block, answer)) for answer in block.answers)
        self._rows = sum(block.rows for block in self._blocks)
        self._saved = (memory.base, memory.rows)
        self._begin, used = secrets.randbits(32), {block.begin for block in self._blocks}
        while self._begin in used:
            self._begin = secrets.randbits(32)
        self._numbers, self._requests = count(), count()
        self._open: Block | None = None
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._held: IO[str] | None = None
        self._forget()

    @classmethod
    def open(cls, folder: Path, empty: ErrorMemory, waiting: Waiting | None = None) -> Feedback:
        """Open the folder of an error memory for this process alone, and make it if it is not there. empty: the memory
        to begin with where there is none, or one of another width.

        Raises ExportError: another server has it, or a file in it is damaged; OSError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        held, memory = hold(folder, "--memory"), empty
        try:
            remove_partial(folder)
            if (folder / FILE).exists():
                found = ErrorMemory.load(folder, empty.settings)
                memory = found if found.width == empty.width else empty
                memory.written = found.written
            opened = cls(memory, folder, waiting)
        except BaseException:
            held.close()
            raise
        opened._held = held
        return opened

    def close(self) -> None:
        """Let others have the folder."""
        if self._held is not None:
            self._held.close()
            self._held = None

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
        token, rows = token_of(self._begin, next(self._requests)), len(prediction)
        with self._lock:
            if rows:
                if self._open is None or not self._open.has_room(hidden):
                    self._close_block()
                    room = max(rows, min(BLOCK_ROWS, self._waiting.rows))
                    self._open = Block(self._begin, next(self._numbers), room, hidden.shape[1])
                    self._blocks.append(self._open)
                answer = self._open.add(token, self._clock(), base, prediction, hidden)
                self._answered[token] = (self._open, answer)
            self._rows += rows
            self._forget()
        return found, [f"{token}-{row}" for row in range(rows)]

    def _close_block(self) -> None:
        if self._open is not None:
            self._open.shrink()
            self._open = None

    def _forget(self) -> None:
        """Give up the oldest answers: too many, or too old."""
        late = self._clock() - self._waiting.seconds
        while self._answered:
            block, oldest = next(iter(self._answered.values()))
            if self._rows <= self._waiting.rows and oldest.at >= late:
                return
            self._answered.popitem(last=False)
            self._rows -= oldest.rows
            block.left -= oldest.rows

    def take(self, labels: Sequence[tuple[str, int]]) -> dict[str, int]:
        """Write rows whose labels have come, by key. Returns how many were taken, of keys that nobody waits for
        (`unknown`), that came before (`repeated`), and of a model that is not served any more (`stale`)."""
        told = dict.fromkeys(RESULTS, 0)
        hidden, prediction, known = [], [], []
        with self._lock:
            self._forget()
            for key, label in labels:
                token, _, place = key.rpartition("-")
                block, answer = self._answered.get(token, (None, None))
                row = int(place) if place.isascii() and place.isdigit() and len(place) < 10 else -1
                if block is None or answer is None or not 0 <= row < answer.rows:
                    told["unknown"] += 1
                    continue
                row += answer.first
                if not block.waits[row]:
                    told["repeated"] += 1
                    continue
                block.waits[row] = False
                if answer.base != self.memory.base:
                    told["stale"] += 1
                    continue
                told["taken"] += 1
                hidden.append(block.hidden[row])
                prediction.append(block.prediction[row])
                known.append(label)
            if known:
                rows = torch.from_numpy(np.stack(hidden)), torch.tensor(known), torch.tensor(np.array(prediction))
                self.memory.add(*rows)
        return told

    def save(self) -> None:
        """Write what is new to the folder, if there is one: answers first, then the memory, which says whose labels it
        has. Raises OSError."""
        if self._folder is None:
            return
        with self._saving:  # a server that stops saves while it may be saving
            with self._lock:  # the memory and whose labels it has, of one moment
                self._forget()
                self._close_block()
                blocks = list(self._blocks)
                now = (self.memory.base, self.memory.rows)
                memory = self.memory.copied(written_rows(blocks)) if now != self._saved else None
            for block in blocks:
                if block.left and not block.saved:
                    block.write(self._folder)
            if memory is not None:
                write_whole(self._folder / FILE, sealed(*memory))
                self._saved = now
            for block in blocks:  # behind the memory, which may be the only one to know that they have their labels
                if not block.left:
                    (self._folder / block.name).unlink(missing_ok=True)
            with self._lock:
                self._blocks = [block for block in self._blocks if block.left or block not in blocks]
