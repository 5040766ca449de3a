"""The coldest rows of a full table, exactly, without looking at the whole table every step.

A row's heat is (last seen, count) for LRU and (count, last seen) for LFU; ties are broken by row number. While a row
lives its heat only grows. So after one walk over the table that kept the K coldest rows (the pool; the hottest of
them is the bound), every other row stays above the bound, except rows that were given to new ids since the walk
began. The coldest rows are therefore among the pool and those new rows as long as enough of them are below the
bound. The next walk advances by a slice with every call, so that it is done before the pool runs out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedding.row_index import RowIndex
from kernels.gather import gather
from kernels.touch import COUNT, LAST_SEEN, coldest

COLUMN = {"lru": LAST_SEEN, "lfu": COUNT}
SLICE_ROWS = 1 << 18
LEAST_SLICE_ROWS = 1 << 12


class _Walk:
    """The coldest rows of the part of the table that has been walked."""

    def __init__(self, index: RowIndex, column: int, size: int) -> None:
        self._index, self._column, self._size = index, column, size
        self._position, self._end = 0, index.end
        self._rows = torch.empty(0, dtype=torch.int64, device=index.device)
        self._heat = self._rows.new_empty((0, 2))
        #: Everything that is not in `rows` is hotter than this (value, other, row); None: there is nothing else.
        self.bound: tuple[int, int, int] | None = None

    @property
    def done(self) -> bool:
        return self._position == self._end

    @property
    def rows(self) -> Tensor:
        return self._rows.sort().values

    def advance(self, rows: int) -> None:
        stop = min(self._end, self._position + max(rows, LEAST_SLICE_ROWS))
        while self._position < stop:
            upto = min(stop, self._position + SLICE_ROWS)
            self._merge(coldest(self._index.meta, self._column, self._size, self._position, upto))
            self._position = upto

    def _merge(self, found: Tensor) -> None:
        rows = torch.cat([self._rows, found])
        heat = torch.cat([self._heat, _heat_of(self._index, self._column, found)])
        if found.numel() == self._size or rows.numel() > self._size:
            self.bound = _kth_coldest(heat, rows, self._size)
            below = _at_most(heat, rows, self.bound)
            rows, heat = rows[below], heat[below]
        self._rows, self._heat = rows, heat


class ColdRows:
    """policy: lru or lfu. Tell it of every row that is given to an id (`add`); the rest it reads from the index."""

    def __init__(self, index: RowIndex, policy: str) -> None:
        self._index = index
        self._column = COLUMN[policy]
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt: rows may have become colder."""
        self._pool: Tensor | None = None
        self._bound: tuple[int, int, int] | None = None
        self._added: list[Tensor] = []
        self._walk: _Walk | None = None
        self._added_since_walk: list[Tensor] = []
        self._size = 0
        self._added_rows = 0

    def add(self, rows: Tensor) -> None:
        """Rows that were given to ids."""
        if self._pool is None:
            return
        self._added.append(rows)
        if self._walk is not None:
            self._added_since_walk.append(rows)
        self._added_rows += rows.numel()
        if self._added_rows > self._index.end:  # rows came and went by expiry: a new walk is as cheap
            self.reset()

    def take(self, wanted: int, keep: Tensor) -> Tensor | None:
        """The `wanted` (1 or more) coldest rows in use, coldest first, none of `keep` (int64); None if too few.

        -1 in `keep` is ignored. Rows taken must be freed before the next call.
        """
        keep = keep[keep >= 0]
        if self._pool is not None:
            self._walk_on(wanted, keep.numel())
            chosen = self._choose(wanted, keep)
            if chosen is None and self._walk is not None:
                self._finish_walk()
                chosen = self._choose(wanted, keep)
            if chosen is not None:
                return chosen
        # The first call, or it takes more than the pool was made for.
        self._begin_walk(wanted, keep.numel())
        self._finish_walk()
        return self._choose(wanted, keep)

    def _begin_walk(self, wanted: int, kept: int) -> None:
        # A pool of K costs about K per call and a walk (the table / K) per row taken: least at the root.
        self._size = max(2 * (wanted + kept), int((self._index.end * wanted / 2) ** 0.5))
        self._walk = _Walk(self._index, self._column, self._size)
        self._added_since_walk = []

    def _walk_on(self, wanted: int, kept: int) -> None:
        if self._walk is None and self._pool.numel() < self._size * 3 // 4:
            self._begin_walk(wanted, kept)
        if self._walk is not None:
            # A pace of 2 would be done when half of the pool is taken; touched rows leave the pool too.
            self._walk.advance(3 * self._index.end * wanted // self._size)
            if self._walk.done and self._pool.numel() < self._size // 2:
                self._finish_walk()

    def _finish_walk(self) -> None:
        assert self._walk is not None
        self._walk.advance(self._index.end)
        self._pool, self._bound = self._walk.rows, self._walk.bound
        self._added = self._added_since_walk
        self._added_rows = sum(rows.numel() for rows in self._added)
        self._walk, self._added_since_walk = None, []

    def _choose(self, wanted: int, keep: Tensor) -> Tensor | None:
        """Take the coldest rows out of the pool; None if there may be colder ones outside."""
        assert self._pool is not None
        pool = torch.cat([self._pool, *self._added]).unique() if self._added else self._pool
        self._added, self._added_rows = [], sum(rows.numel() for rows in self._added_since_walk)
        heat = _heat_of(self._index, self._column, pool)
        below = heat[:, 1 - self._column] > 0
        if self._bound is not None:
            below &= _at_most(heat, pool, self._bound)
        pool, heat = pool[below], heat[below]
        free = torch.ones_like(pool, dtype=torch.bool)
        if pool.numel():
            place = torch.searchsorted(pool, keep).clamp(max=pool.numel() - 1)
            free[place[pool[place] == keep]] = False
        candidates = free.nonzero().flatten()
        self._pool = pool
        if candidates.numel() < wanted:
            return None
        chosen = candidates[_coldest_first(heat[candidates], pool[candidates], wanted)]
        rest = torch.ones_like(free)
        rest[chosen] = False
        self._pool = pool[rest]
        return pool[chosen]


def _heat_of(index: RowIndex, column: int, rows: Tensor) -> Tensor:
    """int64 [n, 2]: the column that decides, the one that breaks ties."""
    meta = gather(index.meta, rows, 2)
    return meta if column == 0 else meta.flip(1)


def _kth_coldest(heat: Tensor, rows: Tensor, k: int) -> tuple[int, int, int]:
    """(value, other, row) of the k-th coldest of distinct rows, k from 1."""
    keys, bound = torch.cat([heat, rows[:, None]], dim=1), []
    for column in range(3):
        key = keys[:, column]
        kth = int(key.kthvalue(k).values)
        bound.append(kth)
        k -= int((key < kth).sum())
        keys = keys[key == kth]
    value, other, row = bound
    return value, other, row


def _coldest_first(heat: Tensor, rows: Tensor, size: int) -> Tensor:
    """Positions of the `size` coldest of distinct rows, coldest first."""
    positions = torch.arange(rows.numel(), device=rows.device)
    if size < rows.numel():
        positions = positions[_at_most(heat, rows, _kth_coldest(heat, rows, size))]
    for key in (rows, heat[:, 1], heat[:, 0]):  # the last sort decides; all are stable
        positions = positions[key[positions].argsort(stable=True)]
    return positions


def _at_most(heat: Tensor, rows: Tensor, bound: tuple[int, int, int]) -> Tensor:
    value, other = heat.unbind(1)
    tie = (other < bound[1]) | ((other == bound[1]) & (rows <= bound[2]))
    return (value < bound[0]) | ((value == bound[0]) & tie)
