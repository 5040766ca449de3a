"""The way of a batch into its step, and how the next step's batch goes it while a step is trained.

A batch is agreed on by all ranks, brought to the device, and its ids are sent to the ranks that own their rows. On a
GPU, or where tables have a cache, that is begun one step before, unless something looks at the tables or the reader
between the two steps. `Engine.train_step` sees none of it: the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.table_settings import shortest_ttl_days
from tessera.ctr.train.clock import Clock
from tessera.ctr.train.progress import Progress
from tessera.distributed.rank import Process
from tessera.distributed.side_stream import SideStream
from tessera.distributed.tables import Tables, as_dynamic, as_sharded


class LookAhead:
    """Passes batches on. `peek` is the one that comes next."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._next: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.peek()) is not None:
            self._next = None
            yield batch

    def peek(self) -> Batch | None:
        """Return the next batch, read if it was not yet; None at the end."""
        if self._next is None:
            self._next = next(self._batches, None)
        return self._next


@dataclass
class ReadyBatch:
    """A batch on its device, and what all ranks know of its step.

    batch: as it was read; sent: what of it is on its way to other ranks, if anything; times: int64 [B] of its events on
    the device, if rows are touched with them; weight: summed over the global batch; now: what time it is for the
    tables, in seconds; stop: whether to leave after its step.
    """

    batch: Batch
    on_device: Batch
    sent: Any
    times: Tensor | None
    weight: float
    now: int
    stop: bool


class StepPipeline:
    """Gets batches ready for their steps.

    Attributes:
        overlaps: whether the next step's batch is begun while a step is trained.
        stopping: a rank was asked to stop; all ranks learn it in the same step.
    """

    def __init__(self, config: Config, tables: Tables, process: Process, progress: Progress) -> None:
        self._config, self._process, self._progress = config, process, progress
        self._tables, rows = as_sharded(tables), as_dynamic(tables)
        self.overlaps = process.device.type == "cuda" or (rows is not None and rows.prefetches)
        self.stopping = False
        self._expires = shortest_ttl_days(config) is not None
        self._clock = Clock(config, process)
        self._side = SideStream(process.device)
        self._coming: LookAhead | None = None
        self._next: ReadyBatch | None = None  # the next step's batch, if this step has begun with it

    def feed(self, batches: Iterable[Batch], *, begins: bool) -> Iterator[Batch]:
        """Pass batches on, one for each step; each step may see the one that comes next.

        begins: they are those of an epoch from its beginning, which may be older than where the last one ended.
        """
        if begins:
            self._progress.now = 0
        self._coming = LookAhead(batches)
        try:
            yield from self._coming
        finally:
            self._coming = None  # the reader's threads end

    def take(self, batch: Batch) -> ReadyBatch:
        """Return the batch of the step that begins now, ready; set the clock to its time."""
        self._process.stage = f"step {self._progress.step}: forward"
        ready, self._next = self._next, None
        if ready is None:
            ready = self._begin(batch)
        assert ready.batch is batch
        self._side.begin_step(ready)
        self._progress.now, self.stopping = ready.now, ready.stop
        return ready

    @contextmanager
    def next_begun(self) -> Iterator[None]:
        """Wrap the forward pass of a step: begin with the next step's batch before it. After it, with the device busy,
        send that batch's ids, of which their owners know the number now."""
        self._next = self._begin_next()
        yield
        if self._tables:
            with self._side.queued():
                self._tables.send_prepared()

    def _begin(self, batch: Batch) -> ReadyBatch:
        """Agree on a batch, bring it to the device and, where steps overlap, begin to send its ids to their owners."""
        agreed = self._clock.agree(batch, self._progress.now)  # before the copy: these are numbers for the host
        with self._side.queued():
            on_device = to_device(batch, self._process.device)
            times = on_device.time if self._clock.of_events else None
            tables = self._tables if self.overlaps else None
            sent = None if tables is None else tables.prepare(on_device.ids, agreed.now, times)
        return ReadyBatch(batch, on_device, sent, times, *agreed)

    def _begin_next(self) -> ReadyBatch | None:
        """Begin with the next step's batch, if there is one and nothing must happen before it."""
        if not self.overlaps or self._coming is None or self._pauses_after(self._progress.step + 1):
            return None
        coming = self._coming.peek()
        self._process.stage = f"step {self._progress.step}: forward"
        return None if coming is None else self._begin(coming)

    def _pauses_after(self, step: int) -> bool:
        """Return whether rows may expire, or there is an evaluation, a saved state or the end, between a step and the
        next. The same on all ranks. A log line is not among them: it must not change what is trained."""
        trainer, embedding = self._config.trainer, self._config.embedding
        expiry = embedding.expire_every if self._expires else None
        every = (expiry, trainer.eval_every, trainer.checkpoint.every, trainer.max_steps)
        return self.stopping or any(number is not None and step % number == 0 for number in every)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on the device. The host does not wait for what a GPU has to do before the copy, and keeps what
    it would have to ask the GPU for later."""
    if device.type != "cuda":
        return batch.to(device)
    batch.ids.offset_per_key()  # kept by the batch, and taken over by its copies
    return batch.pin_memory().to(device, non_blocking=True)
