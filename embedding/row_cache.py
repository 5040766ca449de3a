"""Some rows of a host table on a device, as they are stored, so that low-precision rows move as they are.

The rows of a batch are brought to slots while the batch before it may still be trained (ScaleFreeCTR, arXiv
2104.08542): slots that either of the two batches wants are never taken. Others are taken by the clock rule: a hand goes
round, a slot that was wanted since the hand passed it is passed once more. What was changed in a slot is written back
to the host before the slot is taken, by the same thread that fetches, so that a row that comes again is never old.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tessera.embedding.alpt import TwoPassUpdate
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.errors import CacheFull
from tessera.embedding.optim import by_age
from tessera.embedding.row_store import RowStore
from tessera.kernels.chunks import allocate_chunk
from tessera.kernels.gather import gather
from tessera.kernels.scatter import scatter

LEAST_WINDOW = 1024  # slots that the hand looks at together, at least
CHUNKS = 16  # of a full cache: memory is reserved by so many parts, when it is first needed
COUNTERS = ("hits", "misses", "written_back")


class RowCache:
    """Slots for `config.cache_limit` rows of `host`. One batch is brought after the other; row numbers and what is
    known of slots are on the host, values are on `device`.

    Attributes:
        store: the rows on the device, by slot. total: hits, misses (rows fetched), written_back (rows), since start.
    """

    def __init__(self, config: DynamicTableConfig, host: RowStore, device: torch.device | str) -> None:
        assert config.cache_limit is not None, config.name
        self.capacity, self.optimizer = config.cache_limit, config.optimizer
        self.device = torch.device(device)
        part = 1 << max(0, (self.capacity // CHUNKS).bit_length() - 1)
        self.store = RowStore(dataclasses.replace(config, chunk_rows=min(config.chunk_rows, part)), device, host.decay)
        self._copies = self.device.type == "cuda" and torch.cuda.is_available()  # in the order of a stream
        if self._copies:
            # Addresses of chunks are kept on the device: they must not change while a step and a fetch both read them.
            self.store.grow_to(self.capacity)
        self.total = dict.fromkeys(COUNTERS, 0)
        self.changed = False  # whether something may not have been written back
        self._name, self._host, self._chunk_rows = config.name, host, config.chunk_rows
        self._slot_of_row: list[Tensor] = []  # int32 [chunk_rows, 1]: slot + 1, or 0
        self._row = torch.zeros(self.capacity, dtype=torch.int64)  # of each slot, + 1, or 0
        self._wanted = torch.zeros(self.capacity, dtype=torch.int64)  # the batch that wanted the slot last
        self._again = torch.zeros(self.capacity, dtype=torch.bool)  # wanted since the hand passed
        self._dirty = torch.zeros(self.capacity, dtype=torch.bool)  # may differ from the host
        self._batch, self._hand, self._end = 1, 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device of all slots ever taken."""
        return self._end * self.store.bytes_per_row

    def bring(self, rows: Tensor) -> Tensor:
        """Return the slots of the rows of the next batch, which will be updated there: int64 [u], -1 where the row is
        -1.

        rows: int64 [u], distinct but for -1. Slots are good until the batch after the next is brought. Raises CacheFull
        if they do not fit beside the rows of the batch before.
        """
        self._batch += 1
        slots = self._slots(rows)
        known = slots[slots >= 0]
        self._wanted[known] = self._batch
        missing = ((slots < 0) & (rows >= 0)).nonzero().flatten()
        if missing.numel():
            slots[missing] = self._fetch(rows[missing])
        wanted = slots[slots >= 0]
        self._again[wanted] = True
        self._dirty[wanted] = True
        self.changed = True
        self._count(hits=known.numel(), misses=missing.numel())
        return slots

    def _fetch(self, rows: Tensor) -> Tensor:
        """Assign slots to rows that have none and copy the rows there; return the slots."""
        slots = self._take(rows.numel())
        self._write_back(slots[self._dirty[slots]])
        before = self._row[slots]
        self._note_slots(before[before > 0] - 1, None)
        self._row[slots] = rows + 1
        self._note_slots(rows, slots)
        end = int(slots.max()) + 1
        self._end = max(self._end, end)
        self.store.grow_to(end)
        parts = self._host.stored(rows)
        if self._copies:
            parts = [part.pin_memory() for part in parts]
        self.store.store(slots.to(self.device), [part.to(self.device, non_blocking=True) for part in parts])
        return slots

    def _take(self, count: int) -> Tensor:
        """Return slots that neither this batch nor the one before uses."""
        taken, looked_at, left = [], 0, count
        while left:
            if looked_at > 2 * self.capacity:  # every slot was passed and looked at again
                self._fail(left)
            begin = self._hand
            end = min(self.capacity, begin + max(2 * left, LEAST_WINDOW))
            idle = self._wanted[begin:end] < self._batch - 1
            chosen = (idle & ~self._again[begin:end]).nonzero().flatten()[:left] + begin
            if chosen.numel() == left:
                end = int(chosen[-1]) + 1
            self._again[begin:end] &= ~idle[: end - begin]
            self._wanted[chosen] = self._batch
            taken.append(chosen)
            left -= chosen.numel()
            looked_at += end - begin
            self._hand = end % self.capacity
        return torch.cat(taken)

    def _fail(self, more: int) -> None:
        needed = int((self._wanted >= self._batch - 1).sum()) + more
        raise CacheFull(
            f"table {self._name}: two batches in a row need {needed:,} rows in the cache, which has {self.capacity:,}; "
            "raise cache_rows or cache_bytes, or make the batch smaller"
        )

    def end_step(self) -> None:
        """Mark that no step runs: the slots of the last batch may be taken, too."""
        self._batch += 1

    def drop(self, rows: Tensor) -> None:
        """Forget rows (int64 [n], without -1) that were evicted or replaced on the host. A slot that a running step
        uses is not taken before that step is over."""
        slots = self._slots(rows)
        slots = slots[slots >= 0]
        self._note_slots(self._row[slots] - 1, None)
        self._row[slots] = 0
        self._dirty[slots] = False

    def flush(self) -> None:
        """Write back all rows that may have changed. They stay in their slots; those of the last batch may change
        again."""
        if not self.changed:
            return
        self.changed = False
        slots = self._dirty[: self._end].nonzero().flatten()
        self._write_back(slots)
        self._dirty[slots[self._wanted[slots] < self._batch]] = False

    def _write_back(self, slots: Tensor) -> None:
        if slots.numel():
            parts = self.store.stored(slots.to(self.device))
            parts = [part.to("cpu", non_blocking=True) for part in parts]  # to pinned memory
            if self._copies:
                torch.cuda.current_stream(self.device).synchronize()
            self._host.store(self._row[slots] - 1, parts)
            self._count(written_back=slots.numel())

    def _slots(self, rows: Tensor) -> Tensor:
        """Return the slots of rows, int64 [n]; -1 for rows (or -1) without a slot."""
        if rows.numel():
            self._reserve(int(rows.max()) + 1)
        if not self._slot_of_row:
            return torch.full_like(rows, -1)
        return gather(self._slot_of_row, rows, 1).flatten().long() - 1

    def _note_slots(self, rows: Tensor, slots: Tensor | None) -> None:
        if rows.numel():
            numbers = torch.zeros(1, dtype=torch.int64) if slots is None else slots + 1
            scatter(self._slot_of_row, rows, numbers.int().unsqueeze(1))

    def _reserve(self, end: int) -> None:
        while len(self._slot_of_row) * self._chunk_rows < end:
            self._slot_of_row.append(allocate_chunk((self._chunk_rows, 1), torch.int32))

    def _count(self, **more: int) -> None:
        for name, number in more.items():
            self.total[name] += number


class CachedRows:
    """Stands for the table in the step of one batch: its methods are those of `DynamicTable`, with slots for rows.

    old: bool [u] of the batch's rows, as `by_age` takes it. counts: int64 [u], how often they were seen, where
    decay asks.
    """

    def __init__(self, cache: RowCache, step: int, old: Tensor | None, counts: Tensor | None) -> None:
        self._cache, self._step, self._old, self._counts = cache, step, old, counts

    def _counts_of(self, slots: Tensor) -> Tensor:
        assert self._counts is not None
        return self._counts

    def gather(self, rows: Tensor, inverse: Tensor | None = None) -> Tensor:
        return self._cache.store.gather(rows, inverse)

    def update(self, rows: Tensor, grads: Tensor, inverse: Tensor | None, lr: float | None, ids: Tensor | None) -> None:
        self._cache.changed = True
        parts, grads, inverse = by_age(rows, self._old, grads, inverse, self._cache.optimizer, lr)
        kept = self._cache.store.pass_step(rows, lr, self._counts_of)
        for part, rate in parts:
            self._cache.store.update(part, grads, inverse, rate, ids, self._step, kept)

    def begin_update(
        self, rows: Tensor, grads: Tensor, inverse: Tensor | None, lr: float | None, ids: Tensor | None
    ) -> TwoPassUpdate:
        self._cache.changed = True
        update = TwoPassUpdate(self._cache.store, rows, ids, self._step)
        parts, grads, inverse = by_age(rows, self._old, grads, inverse, self._cache.optimizer, lr)
        update.update(grads, inverse, parts, self._cache.store.pass_step(rows, lr, self._counts_of))
        return update
