"""The way of a batch into its step, and how the next step's batch goes it while a step is trained.

A batch is brought to the device, its ids are sent to the ranks that own their rows, and with them goes what all ranks
must agree on. On a GPU, or where tables have a cache, that is begun one step before, unless something looks at the
tables or the reader between the two steps. `Engine.train_step` sees none of it: the result is the same.
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
from tessera.ctr.train.clock import Agreed, Clock
from tessera.ctr.train.progress import Progress
from tessera.distributed.collectives import gather
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

    batch: as it was read; told: what this rank says of it; sent: what of it is on its way to other ranks, if anything;
    times: int64 [B] of its events on the device, if rows are touched with them; agreed: by all ranks, once that is
    known.
    """

    batch: Batch
    on_device: Batch
    told: Tensor
    sent: Any
    times: Tensor | None
    agreed: Agreed | None = None

    @property
    def weight(self) -> float:
        """Summed over the global batch."""
        assert self.agreed is not None
        return self.agreed.weight

    @property
    def now(self) -> int:
        """What time it is for the tables, in seconds."""
        assert self.agreed is not None
        return self.agreed.now


class StepPipeline:
    """Gets batches ready for their steps.

    Attributes:
        overlaps: whether the next step's batch is begun while a step is trained.
        stopping: a rank was asked to stop; all ranks learn it in the same step.
    """

    def __init__(self, config: Config, tables: Tables, process: Process, progress: Progress) -> None:
        self._config, self._process, self._progress = config, process, progress
        self._tables, self._rows = as_sharded(tables), as_dynamic(tables)
        self._brings = self._rows is not None and self._rows.prefetches
        self.overlaps = process.device.type == "cuda" or self._brings
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

    def at_end(self) -> bool:
        """Return whether the batch that was passed on last is the last one of an epoch. Reads the next one."""
        return self._coming is not None and self._coming.peek() is None

    def take(self, batch: Batch) -> ReadyBatch:
        """Return the batch of the step that begins now, ready; set the clock to its time."""
        self._process.stage = f"step {self._progress.step}: forward"
        ready, self._next = self._next, None
        if ready is None:
            ready = self._begin(batch)
            self._agree(ready)
        assert ready.batch is batch and ready.agreed is not None
        self._side.begin_step(ready)
        self._progress.now, self.stopping = ready.agreed.now, ready.agreed.stop
        return ready

    @contextmanager
    def next_begun(self) -> Iterator[None]:
        """Wrap the forward pass of a step: begin with the next step's batch before it. After it, with the device busy,
        the host takes what came with that batch's ids."""
        self._next = self._begin_next()
        yield
        if self._next is not None and self._next.agreed is None:
            self._agree(self._next)
        if self._tables:
            with self._side.queued():
                self._tables.send_begun()

    def _begin(self, batch: Batch) -> ReadyBatch:
        """Bring a batch to the device; where steps overlap, or ranks agree by it, begin to send its ids to their
        owners."""
        told = self._clock.tell(batch)  # before the copy: these are numbers for the host
        with self._side.queued():
            on_device = to_device(batch, self._process.device)
            times = on_device.time if self._clock.of_events else None
            sent = None
            if self._tables and (self.overlaps or self._tables.tells):
                sent = self._tables.begin(on_device.ids, times, told)
        return ReadyBatch(batch, on_device, told, sent, times)

    def _agree(self, ready: ReadyBatch) -> None:
        """Let all ranks agree on a batch, and bring its rows to the caches of tables."""
        with self._side.queued():
            told = ready.sent.told if self._tables and self._tables.tells else gather(ready.told)
            ready.agreed = self._clock.agree(ready.batch, told, self._progress.now)
            if self._rows is not None and ready.sent is not None:
                self._rows.bring(ready.agreed.now)

    def _begin_next(self) -> ReadyBatch | None:
        """Begin with the next step's batch, if there is one and nothing must happen before it."""
        if not self.overlaps or self._coming is None or self._pauses_after(self._progress.step + 1):
            return None
        coming = self._coming.peek()
        self._process.stage = f"step {self._progress.step}: forward"
        if coming is None:
            return None
        ready = self._begin(coming)
        if self._brings:  # while this step is computed
            self._agree(ready)
        return ready

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
