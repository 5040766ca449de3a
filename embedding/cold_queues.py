"""The coldest rows of all full tables of a set in GPU memory, exactly, and without waiting for the GPU.

`cold_rows.py` has the rule, which is the same here: a row's heat is (last seen, count, row) or (count, last seen, row),
and only grows. One pass over the set makes a queue of the coldest rows of every table that evicts; the bound of a table
says how hot a row must be to be left out. Each step looks at all entries: rows that were freed or have risen above the
bound go, those that the batch has touched may not be evicted now. How many of each table may be, the host learns by the
read that tells it how many ids are new, so it knows before it evicts whether the queue is long enough; where it is
not, another pass comes first, for which the host waits.

Rows given to ids that are not above the bound (always with LFU, with LRU where times go back) are added behind the
queue, and it is put in order before it is used again. That takes more operations, but no wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from tessera.embedding.cold_rows import QUEUE_LEAST, QUEUE_SHARE, SAMPLE
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.record_store import RecordStore
from tessera.embedding.rows_of_tables import RowsOfTables, Victims
from tessera.kernels import backend
from tessera.kernels.host_numbers import on_device
from tessera.kernels.id_map import IdMap

QUEUE_MOST = 1 << 16  # rows of a table, unless one step needs so many: the queue is looked at in every step
STEPS = 32  # a pass is made for so many steps like the one that asks for it, or more
_ROW, _OF, _HEAT, _NEXT = 0, 2, 3, 4  # lines of entries, see `kernels/triton_ops/cold_queue.py`
_LINES = 5
_TOLD = 3  # numbers that the host is told ahead of those of tables
_COLDEST, _HOTTEST = -(2**63), 2**63 - 1
_STAYS = 1 << 32
_NO_LIMIT = 1 << 62


class ColdQueues:
    """tables: those of the set, of which some evict at a limit."""

    def __init__(
        self, tables: Sequence[DynamicTableConfig], rows: RowsOfTables, store: RecordStore, id_map: IdMap
    ) -> None:
        self._rows, self._store, self._map = rows, store, id_map
        self._limits = [table.row_limit for table in tables]
        self._evicts = [
            table.row_limit is not None and table.eviction != "raise" and table.cache_limit is None for table in tables
        ]
        self._by_count = [int(table.eviction == "lfu") for table in tables]
        self._most: tuple[list[int], Tensor | None] = [], None
        none = torch.zeros(0, dtype=torch.int64, device=store.device)
        self._entries, self._flags, self._sums, self._begins, self._bounds = none, none, none, none, none
        self._room = 1024  # others that entries have memory for
        self.passes = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt: rows may have become colder."""
        self.filled = False
        self._free = [0] * len(self._limits)  # of each table, rows that may be evicted
        self._unsorted = self._touched = False
        self._others = self._alive = self._queued = 0
        self._count = torch.zeros(1, dtype=torch.int64, device=self._store.device)  # of others

    @property
    def _ops(self) -> ModuleType:
        ops = backend.triton_for(self._count)
        assert ops is not None
        return ops

    @property
    def _records(self) -> tuple[list[Tensor], tuple[int, ...]]:
        return self._store.chunks, self._store.layout.numbers

    def most(self, used: Sequence[int], batch: int) -> Tensor | None:
        """Return how many ids of a batch each table may have, int64 [tables], so that it cannot raise TableFull; None
        where no batch of so many ids can make one."""
        known = zip(self._limits, self._evicts, used, strict=True)
        found = [_NO_LIMIT if limit is None else limit - (0 if evicts else rows) for limit, evicts, rows in known]
        if min(found) >= batch:
            return None
        if found != self._most[0] or self._most[1] is None:
            self._most = found, on_device(found, self._store.device)
        return self._most[1]

    def look(self) -> Tensor:
        """Look at all entries, once the batch's rows were touched. Returns what `learn` takes, int64 [k]."""
        self._unsorted |= self._touched
        found = self._ops.cold_look(self._records, self._entries, self._count, self._queued, self._begins, self._bounds)
        self._flags, self._sums, told = found
        whole: Tensor = told
        return whole

    def learn(self, told: Sequence[int]) -> None:
        """Take over what `look` found, when the host has read it."""
        tables = len(self._limits)
        self._others, touched, self._alive = told[:_TOLD]
        behind, queued = told[_TOLD : _TOLD + tables], told[_TOLD + tables :]
        self._free = [one + other for one, other in zip(behind, queued, strict=True)]
        self._touched = touched > 0
        if self._others > max(self._queued, QUEUE_MOST):  # rows come and go by expiry: a new pass is as cheap
            self.reset()

    def freed(self) -> None:
        """Take out the rows that have been freed."""
        if self.filled:
            self.look()

    def take(self, missing: Sequence[int], spare: Tensor, bounds: Tensor) -> Victims | None:
        """Return the coldest rows of each table, so many, none of `spare`: the rows of the batch, those of table t
        between its bounds. They are as good as freed. None if a table has too few."""
        if not self.filled or any(want > free for want, free in zip(missing, self._free, strict=True)):
            self._pass(missing, spare, bounds.diff().tolist())
            if any(want > free for want, free in zip(missing, self._free, strict=True)):
                return None
        elif self._unsorted or self._others:
            self._sort(self._alive)
        before = [0, *accumulate(missing)]
        wanted = on_device([*missing, *before[:-1]], self._store.device).view(2, -1)
        looked = self._entries, self._flags, self._sums, self._begins
        places = self._map.places
        taken = self._ops.cold_take(self._records, places, looked, wanted, before[-1])
        rows, ids, tables, at = taken
        return Victims(rows, ids, tables, at, list(missing))

    def add(self, rows: Tensor) -> None:
        """Register rows, with their records written, that were given to ids. The end of a step."""
        if not self.filled:
            return
        if self._others + rows.numel() > self._entries.shape[1] - self._queued:
            # There is no waiting for how many of them are below the bound, so there is room for all.
            self._room = 2 * (self._others + rows.numel())
            held, self._entries = self._entries, self._new(rows.new_full((self._queued + self._room,), -1))
            self._entries[:, : held.shape[1]] = held
            self._entries[_OF, held.shape[1] :] = len(self._limits)
        self._others += rows.numel()
        self._ops.cold_add(self._records, rows, self._entries, self._count, self._queued, self._bounds)

    def _pass(self, missing: Sequence[int], spare: Tensor, sizes: Sequence[int]) -> None:
        """Queue the coldest rows of all tables that evict; the host waits some times."""
        self.passes += 1
        ends, tables = self._rows.ends, range(len(self._limits))
        least = [4 * (missing[t] + sizes[t]) for t in tables]
        size = [max(min(ends[t] // QUEUE_SHARE, QUEUE_MOST), STEPS * missing[t], least[t], QUEUE_LEAST) for t in tables]
        share = [1.25 * size[t] / max(1, ends[t]) for t in tables]
        sample, begins = self._sample()
        while True:
            self._bounds = self._bounds_of(sample, begins, share)
            found, counts = self._ops.cold_scan(self._records, self._bounds, self._rows.extents.end)
            short = [t for t in tables if self._evicts[t] and found[t] < size[t] and share[t] < 1]
            if not short:
                break
            share = [4 * one if t in short else one for t, one in enumerate(share)]
        rows = torch.empty(sum(found), dtype=torch.int64, device=self._store.device)
        self._ops.cold_list(self._records, self._bounds, self._rows.extents.end, counts, rows)
        self._entries, self._queued, self._others = self._new(rows), rows.numel(), 0
        self._count.zero_()
        self._begins = begins
        self._room = max(self._room, 2 * sum(missing))
        self.look()
        self._flags = _STAYS + (~torch.isin(rows, spare)).long()
        self.filled = True
        self._sort(rows.numel())
        self.learn(self._ops.cold_tell(self._sums, self._count, self._begins).tolist())

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Return entries of some rows in use of each table, in order, and where those of a table begin."""
        ends, device = self._rows.ends, self._store.device
        most = max(SAMPLE // 16, min(SAMPLE, (SAMPLE << 4) // len(ends)))
        strides = [max(1, end // most) for end in ends]
        counts = [-(-end // stride) for end, stride in zip(ends, strides, strict=True)]
        numbers = torch.tensor([strides, [0, *accumulate(counts)][:-1], counts], device=device)
        tables = torch.arange(len(ends), device=device).repeat_interleave(numbers[2], output_size=sum(counts))
        places = (torch.arange(sum(counts), device=device) - numbers[1][tables]) * numbers[0][tables]
        rows = self._rows.extents.rows(tables, places)
        entries, begins = self._new(rows), torch.zeros(len(ends) + 1, dtype=torch.int64, device=device)
        none = torch.zeros(1, dtype=torch.int64, device=device)
        every = self._bounds_of(entries, begins, [2.0] * len(ends))
        self._ops.cold_look(self._records, entries, none, rows.numel(), begins, every)
        entries = entries[:, _order(entries)]
        return entries, _begins(entries[_OF].contiguous(), len(ends))

    def _bounds_of(self, sample: Tensor, begins: Tensor, share: Sequence[float]) -> Tensor:
        """Return the bounds of tables, int64 [4, tables], which a share of the sampled rows are not above."""
        device = self._store.device
        shares = torch.tensor(share, dtype=torch.float64, device=device)
        kinds = torch.tensor([self._evicts, self._by_count], dtype=torch.int64, device=device)
        held = begins.diff()
        cut = (shares * held).ceil().long()
        at = (begins[:-1] + cut).clamp(max=max(0, sample.shape[1] - 1))
        heat = sample[[_HEAT, _NEXT, _ROW]]
        bounds = heat[:, at] if sample.shape[1] else heat.new_zeros((3, len(share)))
        bounds = torch.where((cut >= held) | (shares >= 1), _HOTTEST, bounds)
        bounds = torch.where(kinds[0] > 0, bounds, _COLDEST)
        return torch.cat([bounds, kinds[1:]])

    def _new(self, rows: Tensor) -> Tensor:
        entries = torch.full((_LINES, rows.numel()), -1, dtype=torch.int64, device=rows.device)
        entries[_ROW] = rows
        return entries

    def _sort(self, alive: int) -> None:
        """Put all entries in order, of which so many stay."""
        order, tables = _order(self._entries)[:alive], len(self._limits)
        found = self._ops.cold_order(self._entries, self._flags, order, alive + self._room, tables)
        self._entries, self._flags, self._begins = found
        self._queued, self._others, self._unsorted, self._touched = alive, 0, False, False
        self._count.zero_()
        self._sums = self._flags.cumsum(0)


def _order(entries: Tensor) -> Tensor:
    """Return the order of entries by table, heat and row; those that do not stay come last: int64 [n]."""
    lines = entries.unbind()
    order = lines[_ROW].sort()[1]
    for line in (_NEXT, _HEAT, _OF):
        order = order[lines[line][order].sort(stable=True)[1]]
    return order


def _begins(tables: Tensor, count: int) -> Tensor:
    """Return where each table's entries begin, int64 [count + 1], of tables int64 [n] that ascend."""
    return torch.searchsorted(tables, torch.arange(count + 1, device=tables.device))
