"""The coldest rows of a full table, exactly, without looking at the whole table every step.

A row's heat is (last seen, count, row number) for LRU and (count, last seen, row number) for LFU: all different, and
while a row lives its heat only grows. Now and then one pass over the table makes a queue of its coldest rows, coldest
first; the heat of the last is the bound. From then on every row that is neither in the queue nor new stays above the
bound. So the coldest rows are found among the head of the queue, the rows that were passed over or touched
without rising above the bound, and the new ones, until these run short; then comes the next pass.

The queue holds 1/QUEUE_SHARE of the table: a pass (about 20 ns per row of the table) is paid for by as many evictions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tessera.kernels.touch import COUNT, LAST_SEEN

COLUMN = {"lru": LAST_SEEN, "lfu": COUNT}
QUEUE_SHARE = 64
QUEUE_LEAST = 1024
SAMPLE = 1 << 14  # rows by which a pass guesses how cold is cold enough
HOTTEST = (2**63 - 1,) * 3


class Index(Protocol):
    """What is asked of the rows: those of a table of its own (`RowIndex`), or of one of a set (`RowsOfTable`)."""

    device: torch.device

    @property
    def end(self) -> int:
        """Rows ever taken."""
        ...

    def numbers(self, places: Tensor) -> Tensor:
        """Return the numbers of the rows taken as the n-th (int64 [k], below `end`); they ascend as the places do."""
        ...

    def read(self, rows: Tensor) -> Tensor:
        """Return int64 [n, 2 or more]: time and count of rows."""
        ...

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, `read` of it and those after it) for all rows ever taken."""
        ...


class ColdRows:
    """policy: lru or lfu. Tell it of every row that is given to an id (`add`); the rest it reads from the index."""

    def __init__(self, index: Index, policy: str) -> None:
        self._index = index
        self._column = COLUMN[policy]
        self.passes = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt: rows may have become colder."""
        self._queue: Tensor | None = None  # int64 [q], coldest first
        self._heat: Tensor | None = None  # int64 [q, 3]: what their heat was
        self._bound = HOTTEST
        self._size = 0
        self._position = 0  # of the first row of the queue that has not been looked at
        self._others: list[Tensor] = []  # rows outside the rest of the queue that may be below the bound
        self._others_count = 0

    def add(self, rows: Tensor) -> None:
        """Register rows that were given to ids."""
        if self._queue is None:
            return
        self._others.append(rows)
        self._others_count += rows.numel()
        if self._others_count > self._index.end:  # rows come and go by expiry: a new pass is as cheap
            self.reset()

    def take(self, wanted: int, spare: Tensor) -> Tensor | None:
        """Return the `wanted` (1 or more) coldest rows in use, coldest first, none of `spare` (int64); None if too few.

        -1 in `spare` is ignored. The rows taken must be freed before the next call.
        """
        spare = spare[spare >= 0]
        if self._queue is not None:
            chosen = self._choose(wanted, spare)
            if chosen is not None:
                return chosen
        self._pass(wanted + spare.numel())
        return self._choose(wanted, spare)

    def _choose(self, wanted: int, spare: Tensor) -> Tensor | None:
        """Return the coldest rows if they are certain to be among the queue and the rows added since; else None."""
        assert self._queue is not None and self._heat is not None
        look_at = max(0, wanted + wanted // 2 - self._others_count)
        while True:
            upto = min(self._queue.numel(), self._position + look_at)
            # A row may occur twice: it was freed while in the queue, and then given to another id.
            rows = torch.cat([*self._others, self._queue[self._position : upto]]).unique()
            rows, heat = self._below(rows, self._bound)
            self._others, self._others_count, self._position = [rows], rows.numel(), upto
            # The rest of the queue is hotter than the last row looked at.
            sure = ~torch.isin(rows, spare, assume_unique=True)
            if upto < self._queue.numel():
                sure &= _at_most(heat.unbind(1), self._heat[upto].tolist())
            candidates = sure.nonzero().flatten()
            if candidates.numel() >= wanted:
                break
            if upto == self._queue.numel():
                return None
            look_at = 2 * (wanted + self._others_count)
        chosen = candidates[_order(heat[candidates])[:wanted]]
        left = torch.ones_like(sure)
        left[chosen] = False
        self._others = [rows[left]]
        self._others_count -= wanted
        if self._others_count > self._size // 4:
            self._make_queue(torch.cat([rows[left], self._queue[self._position :]]).unique())
        return rows[chosen]

    def _pass(self, least: int) -> None:
        """Queue the coldest rows of the table: `least` or more, if there are so many."""
        self.passes += 1
        end, self._bound = self._index.end, HOTTEST
        self._size = max(end // QUEUE_SHARE, 4 * least, QUEUE_LEAST)
        sample = self._index.numbers(torch.arange(0, end, max(1, end // SAMPLE), device=self._index.device))
        heat = self._below(sample, HOTTEST)[1]
        heat = heat[_order(heat)]
        share = 1.25 * self._size / end
        while True:
            cut = math.ceil(share * heat.shape[0])
            self._bound = tuple(heat[cut].tolist()) if cut < heat.shape[0] else HOTTEST
            rows = self._rows_below_bound()
            if rows.numel() >= self._size or self._bound == HOTTEST:
                break
            share *= 4
        self._make_queue(rows)

    def _rows_below_bound(self) -> Tensor:
        found = []
        for begin, meta in self._index.blocks():
            rows = torch.arange(begin, begin + meta.shape[0], device=meta.device)
            chosen = meta[:, COUNT] > 0
            if self._bound != HOTTEST:
                chosen &= _at_most((meta[:, self._column], meta[:, 1 - self._column], rows), self._bound)
            found.append(rows[chosen])
        return torch.cat(found)

    def _make_queue(self, rows: Tensor) -> None:
        """Queue distinct rows: all those below the bound but for new ones that `add` will tell of."""
        rows, heat = self._below(rows, self._bound)
        if rows.numel() > self._size:
            self._bound = _kth_coldest(heat, self._size)
            below = _at_most(heat.unbind(1), self._bound)
            rows, heat = rows[below], heat[below]
        order = _order(heat)
        self._queue, self._heat = rows[order], heat[order]
        self._position, self._others, self._others_count = 0, [], 0

    def _below(self, rows: Tensor, bound: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return the rows that are in use and not above the bound, int64 [n], with their heat int64 [n, 3]."""
        meta = self._index.read(rows)
        heat = torch.stack([meta[:, self._column], meta[:, 1 - self._column], rows], dim=1)
        chosen = meta[:, COUNT] > 0
        if bound != HOTTEST:
            chosen &= _at_most(heat.unbind(1), bound)
        return rows[chosen], heat[chosen]


def _order(heat: Tensor) -> Tensor:
    """Return positions, coldest first: int64 [n]."""
    order = torch.arange(heat.shape[0], device=heat.device)
    for column in (2, 1, 0):  # the last sort decides; all are stable
        order = order[heat[order, column].argsort(stable=True)]
    return order


def _kth_coldest(heat: Tensor, k: int) -> tuple[int, int, int]:
    """Return the heat of the k-th coldest row, k from 1."""
    bound = []
    for column in range(3):
        key = heat[:, column]
        kth = int(key.kthvalue(k).values)
        bound.append(kth)
        k -= int((key < kth).sum())
        heat = heat[key == kth]
    value, other, row = bound
    return value, other, row


def _at_most(heat: Sequence[Tensor], bound: Sequence[int]) -> Tensor:
    """Return bool [n]: True where the heat of a row, three columns int64 [n], is not above the bound."""
    value, other, row = heat
    tie = (other < bound[1]) | ((other == bound[1]) & (row <= bound[2]))
    return (value < bound[0]) | ((value == bound[0]) & tie)
