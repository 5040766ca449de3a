"""Count ids in a fixed amount of memory, and forget the oldest of them: Monolith's sliding hash filter, by batches.

The memory is a ring of `splits` equal parts, each of buckets of 16 cells. A cell is 16 bits: a signature (12 bits of
a hash, never 0) and a counter (4 bits, stops at 15); 0 is an empty cell. An id has one bucket in every part. New ids
go into the head part; when it is 1/1.2 full the head moves on, and the part AHEAD + 1 places further, the oldest, is
emptied to become the last one ahead. What an id had counted in an older part is carried over into the head when it
is seen again, and is forgotten when it was not seen for as long as the ring takes to turn.

One batch, which defines what a sequence of insertions would leave open:
1. If the head is full it moves on (once).
2. Ids with the same bucket and signature are one id from here on; their counts are added.
3. An id is looked for in its buckets, in the AHEAD parts before the head, the head and the older ones, in this order;
   the first cell with its signature tells its old count (0 without one). New count = old + count, at most 15.
4. If that cell is in the head or ahead, it takes the new count. Otherwise the id takes an empty cell of its bucket in
   the head; ids of one bucket take them in order of first occurrence. Where none is left, the same is done one part
   ahead, and so on.
5. An id passes if its new count reaches the threshold, or if it found no place (the filter fails open).

The filters of many tables are one (`SlidingFilters`): their cells lie one table's behind the other's, and a batch of
all takes one call. Each table has its own ring, with its own size and head, and does what it would alone.

Foreign ids may share a cell: with P parts in use and buckets nearly full, about 13 P of 4095 unknown ids find the
count of another. The filter errs towards admission only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tessera.kernels.host_numbers import on_device
from tessera.kernels.mix import mix64
from tessera.kernels.unique import unique_inverse

WAYS = 16  # cells of a bucket
AHEAD = 2  # parts that take what does not fit the head
FILL = 1.2
COUNTER_MAX = 15
SIGNATURES = 4095
_HASH_OFFSET = 0x243F6A8885A308D3  # apart from the hashes that choose the rank and the place in the id map


class SlidingFilters:
    """The filters of tables. rules: of each table threshold, capacity and splits, as `SlidingHashFilter` has them; None
    for a table without one."""

    def __init__(self, rules: Sequence[tuple[int, int, int] | None], device: torch.device | str = "cpu") -> None:
        self._tables = [table for table, rule in enumerate(rules) if rule is not None]
        thresholds, capacities, self.splits = ([(rule or (0, 0, 0))[place] for rule in rules] for place in range(3))
        for table in self._tables:
            assert 1 <= thresholds[table] <= COUNTER_MAX and self.splits[table] > AHEAD + 1 and capacities[table] >= 1
        sizes = zip(capacities, self.splits, strict=True)
        self.buckets = [math.ceil(size * FILL / max(1, parts - AHEAD - 1) / WAYS) for size, parts in sizes]
        self._begins = [0, *accumulate(s * b for s, b in zip(self.splits, self.buckets, strict=True))]  # in `_cells`
        self._ends = on_device(list(accumulate(self.buckets)), torch.device(device))  # of numbers of buckets
        self._thresholds = on_device(thresholds, self._ends.device)
        self._sizes = on_device([max(1, many) for many in self.buckets], self._ends.device)
        self._cells = torch.zeros((self._begins[-1], WAYS), dtype=torch.int16, device=device)
        self._alike = len({self.splits[table] for table in self._tables}) == 1
        self.used = [[0] * parts for parts in self.splits]
        self.heads = [0] * len(rules)
        self.moved()

    def cells(self, table: int) -> Tensor:
        """Return the cells of a table in place: int16 [splits * buckets, WAYS]."""
        return self._cells[self._begins[table] : self._begins[table + 1]]

    def moved(self) -> None:
        """Note where the parts of each table lie by age, once a head has moved."""
        ages = range(max(self.splits))
        self._order = [
            [(head + AHEAD - age) % max(1, splits) for age in ages]
            for head, splits in zip(self.heads, self.splits, strict=True)
        ]
        # A bucket's number counts those of the tables before it once, its row in `_cells` all their parts.
        shifts = [begin - sum(self.buckets[:table]) for table, begin in enumerate(self._begins[:-1])]
        rows = [
            shifts[table] + order[age] * self.buckets[table] for age in ages for table, order in enumerate(self._order)
        ]
        has = [int(age < splits) for age in ages for splits in self.splits]
        numbers = on_device([*rows, *has], self._cells.device).view(2, len(ages), -1)
        self._rows, self._has = numbers[0], numbers[1].to(torch.uint8)

    def admit(self, ids: Tensor, tables: Tensor, of_tables: Sequence[int], counts: Tensor) -> Tensor:
        """Return which ids pass, bool [k], and all of tables without a filter.

        ids, tables: int64 [k], of_tables[t] of table t, one behind the other, distinct; counts: int64 [k].
        """
        asked = [table for table in self._tables if of_tables[table]]
        if not asked:
            return torch.ones(ids.numel(), dtype=torch.bool, device=ids.device)
        self._slide(asked)
        own = None
        if sum(of_tables[table] for table in asked) < ids.numel():
            own = (self._thresholds[tables] > 0).nonzero().flatten()
            ids, tables, counts = ids[own], tables[own], counts[own]
        bucket, signature = self._place_of(ids, tables)
        key, inverse, _ = unique_inverse(bucket * (SIGNATURES + 1) + signature)
        counts = torch.zeros_like(key).index_add_(0, inverse, counts)
        bucket, signature = key // (SIGNATURES + 1), key % (SIGNATURES + 1)
        passed = self._add(bucket, signature, counts)[inverse]
        if own is None:
            return passed
        whole = torch.ones(sum(of_tables), dtype=torch.bool, device=ids.device)
        return whole.index_copy_(0, own, passed)

    def _slide(self, asked: Sequence[int]) -> None:
        full = [t for t in asked if self.used[t][self.heads[t]] * FILL >= self.buckets[t] * WAYS]
        for table in full:
            self.heads[table] = (self.heads[table] + 1) % self.splits[table]
            emptied = (self.heads[table] + AHEAD) % self.splits[table]
            begin = emptied * self.buckets[table]
            self.cells(table)[begin : begin + self.buckets[table]] = 0
            self.used[table][emptied] = 0
        if full:
            self.moved()

    def _place_of(self, ids: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Return (number of the bucket, signature 1..4095) of ids: from the lower 40 and the upper 24 bits of a
        hash."""
        hashes, sizes = mix64(ids + _HASH_OFFSET), self._sizes[tables]
        bucket = (hashes & ((1 << 40) - 1)) % sizes + (self._ends[tables] - sizes)
        return bucket, ((hashes >> 40) & ((1 << 24) - 1)) % SIGNATURES + 1

    def _add(self, bucket: Tensor, signature: Tensor, counts: Tensor) -> Tensor:
        """Run steps 3 to 5 for distinct pairs. Returns bool [m]."""
        tables = torch.bucketize(bucket, self._ends, right=True)
        rows_sm = self._rows[:, tables] + bucket
        cells_smw = self._cells.index_select(0, rows_sm.flatten()).view(*rows_sm.shape, WAYS)
        # 16 bits as int16: the upper 12 come out of the shift with a sign.
        signed = torch.where(signature < 2048, signature, signature - 4096).to(torch.int16)
        match_sm = ((cells_smw >> 4) == signed[:, None]).view(torch.uint8).max(dim=2)
        matched = match_sm.values if self._alike else match_sm.values & self._has[:, tables]
        part = matched.max(dim=0)
        known, age = part.values.bool(), part.indices
        way = match_sm.indices.gather(0, age[None])[0]
        cell = rows_sm.gather(0, age[None])[0] * WAYS + way
        flat = self._cells.view(-1)
        old = torch.where(known, flat[cell].to(torch.int64) & COUNTER_MAX, 0)
        new = (old + counts).clamp(max=COUNTER_MAX)
        value = ((signed.to(torch.int64) << 4) | new).to(torch.int16)

        here = known & (age <= AHEAD)
        flat[cell[here]] = value[here]
        left = (~here).nonzero().flatten()
        for age_of_part in range(AHEAD, -1, -1):
            if left.numel() == 0:
                break
            left = self._fill(cells_smw[age_of_part], rows_sm[age_of_part], value, left, tables, age_of_part)
        passed = new >= self._thresholds[tables]
        passed[left] = True
        return passed

    def _fill(self, cells_mw: Tensor, rows: Tensor, value: Tensor, left: Tensor, tables: Tensor, age: int) -> Tensor:
        """Put the pairs `left` into empty cells of the tables' parts of one age. Returns those that found none."""
        rank = _rank_in_bucket(rows[left])
        empty = cells_mw[left] == 0
        chosen = empty & (empty.cumsum(dim=1) == rank[:, None] + 1)
        placed, way = chosen.nonzero().unbind(1)
        at = left[placed]
        self._cells.view(-1)[rows[at] * WAYS + way] = value[at]
        many = torch.bincount(tables[at], minlength=len(self.splits)).tolist()
        for table in self._tables:
            self.used[table][self._order[table][age]] += many[table]
        missed = torch.ones_like(left, dtype=torch.bool)
        missed[placed] = False
        return left[missed]


class SlidingFilterOfTable:
    """The filter of one table of a set: what is saved of it."""

    def __init__(self, filters: SlidingFilters, table: int) -> None:
        self.filters, self._table = filters, table

    @property
    def nbytes(self) -> int:
        return self._cells.numel() * 2

    @property
    def _cells(self) -> Tensor:
        return self.filters.cells(self._table)

    def expire(self, now: int, budget_rows: int | None = None) -> None:
        """Do nothing: the ring forgets by itself."""

    def export_state(self) -> dict[str, Tensor]:
        """Return cells int16 [splits * buckets, 16], used int64 [splits], head int64 []. It cannot be cut by id."""
        used, head = (torch.tensor(one[self._table]) for one in (self.filters.used, self.filters.heads))
        return {"cells": self._cells.clone(), "used": used, "head": head}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Continue as the exporting filter, which must have had the same size. Raises ValueError for another."""
        splits = self.filters.splits[self._table]
        if state["cells"].shape != self._cells.shape or len(state["used"]) != splits:
            found, expected = list(state["cells"].shape), list(self._cells.shape)
            raise ValueError(f"sliding filter: expected {splits} parts, cells {expected}, found {found}")
        self._cells.copy_(state["cells"])
        self.filters.used[self._table] = state["used"].tolist()
        self.filters.heads[self._table] = int(state["head"])
        self.filters.moved()


class SlidingHashFilter(SlidingFilterOfTable):
    """That of a table by itself. capacity: ids remembered at least, in splits - AHEAD - 1 full parts. Cells take 2
    bytes each."""

    def __init__(self, threshold: int, capacity: int, splits: int = 7, device: torch.device | str = "cpu") -> None:
        super().__init__(SlidingFilters([(threshold, capacity, splits)], device), 0)

    def admit(self, ids: Tensor, counts: Tensor, now: int | Tensor, step: int) -> Tensor:
        """Return which ids pass, bool [u], as described in `embedding/admission.py`; `now` and `step` are ignored."""
        return self.filters.admit(ids, torch.zeros_like(ids), [ids.numel()], counts)


def _rank_in_bucket(rows: Tensor) -> Tensor:
    """Return the number of earlier elements with the same value: int64 [n]."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    place = torch.arange(rows.numel(), device=rows.device)
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    rank = torch.empty_like(rows)
    rank[order] = place - torch.where(begins, place, 0).cummax(0).values
    return rank
