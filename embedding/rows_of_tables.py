"""Keep which rows of a set each of its tables has: in use, free again, or not taken yet.

A table's freed rows are taken again, by itself, before new ones, the last freed first. So the same calls always give
the same rows, and a table has the places that it would have alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.embedding.extents import Extents
from tessera.embedding.free_rows import FreeRowsOfTable, FreeRowsOfTables
from tessera.embedding.record_store import MARK, RecordStore
from tessera.kernels.host_numbers import on_device
from tessera.kernels.touch import COUNT, LAST_SEEN

SCAN_ROWS = 1 << 18  # rows looked at in one piece, which bounds the temporary memory of a walk


class Victims(NamedTuple):
    """Rows to be evicted, those of tables one behind the other, each table's coldest first, with their ids, tables and
    places in the id map: int64 [k]. counts: how many of each table."""

    rows: Tensor
    ids: Tensor
    tables: Tensor
    places: Tensor
    counts: list[int]


class RowsOfTables:
    """ends: rows ever taken, of each table. free: those of them that are free. extents: what places are which rows."""

    def __init__(self, tables: int, store: RecordStore) -> None:
        self.extents = Extents(tables, store.device)
        self.ends = [0] * tables
        self.free = FreeRowsOfTables(tables, store.device)
        self._store = store

    def provide(self, ends: dict[int, int], *, limited: bool) -> None:
        """Provide memory for the tables' places below these ends. limited: as `RecordStore.grow_to`.

        Raises torch.OutOfMemoryError as it does; then nothing has changed.
        """
        end = self.extents.end
        for table, rows in ends.items():
            end += self.extents.end_with(table, rows) - self.extents.end
        self._store.grow_to(end, limited=limited)
        for table, rows in ends.items():
            self.extents.grow(table, rows)

    def take_after(self, victims: Victims, tables: Tensor, wanted: Sequence[int], *, limited: bool) -> Tensor:
        """Do `take` as if the victims had been freed before, in their order; each table wants them all."""
        counts, device = victims.counts, tables.device
        more = [want - count for want, count in zip(wanted, counts, strict=True)]
        firsts, before = [0, *accumulate(wanted)], [0, *accumulate(counts)]
        # The last freed is taken first: the n-th new id of a table takes its last victim but n.
        last = [first + begin + count - 1 for first, begin, count in zip(firsts, before, counts, strict=False)]
        if not any(more):
            return victims.rows[on_device(last, device)[tables] - torch.arange(len(tables), device=device)]
        ahead = [first + count - of for first, count, of in zip(firsts, counts, [0, *accumulate(more)], strict=False)]
        numbers = on_device([*last, *ahead, *more], device).view(3, -1)
        of = torch.arange(len(counts), device=device).repeat_interleave(numbers[2], output_size=sum(more))
        new = self.take(of, more, limited=limited)
        again = numbers[0][tables] - torch.arange(len(tables), device=device)
        rows = victims.rows[again.clamp(min=0)]
        return rows.index_copy_(0, numbers[1][of] + torch.arange(len(of), device=device), new)

    def take(self, tables: Tensor, wanted: Sequence[int], *, limited: bool) -> Tensor:
        """Return rows int64 [k] for tables int64 [k], ascending, so many of each. Raises as `provide`."""
        reused = [min(want, free) for want, free in zip(wanted, self.free.counts, strict=True)]
        ends = [end + want - again for end, want, again in zip(self.ends, wanted, reused, strict=True)]
        short = {t: end for t, (end, has) in enumerate(zip(ends, self.extents.capacity, strict=True)) if end > has}
        if short:
            self.provide(short, limited=limited)
        firsts = [0, *accumulate(wanted)]
        # A new row's place is end + (rank - reused), the rank being that among the rows of its table.
        shifts = [end - again - first for end, again, first in zip(self.ends, reused, firsts, strict=False)]
        device = tables.device
        numbers = [shifts, firsts[:-1], reused, self.free.tops()] if any(reused) else [shifts]
        of_ids = on_device([number for one in numbers for number in one], device).view(len(numbers), -1)[:, tables]
        at = torch.arange(tables.numel(), device=device)
        rows = self.extents.rows(tables, (of_ids[0] + at).clamp_(min=0))
        if any(reused):
            rank = at - of_ids[1]
            freed = self.free.flat[(of_ids[3] - rank).clamp_(min=0)]  # the last freed first
            rows = torch.where(rank < of_ids[2], freed, rows)
            self.free.counts = [free - again for free, again in zip(self.free.counts, reused, strict=True)]
        self.ends = ends
        return rows

    def state(self) -> tuple[list[int], list[int]]:
        """Return what `restore` takes to undo `take`s."""
        return list(self.ends), list(self.free.counts)

    def restore(self, state: tuple[list[int], list[int]]) -> None:
        """Undo all `take`s since `state`, if nothing was freed meanwhile."""
        self.ends, self.free.counts = state


class RowsOfTable:
    """The rows of one table of a set: `RowIndex` without the ids' places."""

    def __init__(self, rows: RowsOfTables, store: RecordStore, table: int) -> None:
        self._rows, self._store, self._table = rows, store, table
        self.device = store.device
        self.cursor = 0  # the place at which expiry goes on

    @property
    def end(self) -> int:
        return self._rows.ends[self._table]

    @end.setter
    def end(self, end: int) -> None:
        self._rows.ends[self._table] = end

    @property
    def free(self) -> FreeRowsOfTable:
        return FreeRowsOfTable(self._rows.free, self._table)

    def numbers(self, places: Tensor) -> Tensor:
        """Return the rows at places: int64 [n]. -1 stays."""
        rows = self._rows.extents.rows(self._table, places.clamp(min=0))
        return torch.where(places < 0, -1, rows)

    def places(self, rows: Tensor) -> Tensor:
        """Return the places of rows: int64 [n]. -1 stays."""
        known = rows >= 0
        if bool(known.all()):
            return self._rows.extents.places(self._table, rows)
        places = rows.clone()
        places[known] = self._rows.extents.places(self._table, rows[known])
        return places

    def read(self, rows: Tensor) -> Tensor:
        """Return int64 [n, 4]: time, count, id, mark of rows; [n, 5] with the period."""
        return self._store.meta(rows)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, time, count and id of it and those after it: int64 [k, 3 or more]) for all rows ever
        taken."""
        for _, row, count in self._rows.extents.spans(self._table, 0, self.end):
            yield from self._store.meta_of(row, row + count)

    def walk(self, batch_rows: int, since: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows int64 [k], what `read` gives of them) of rows in use, in order, at most `batch_rows` at once.

        since: only rows that changed under this mark or a later one.
        """
        for begin in range(0, self.end, batch_rows):
            rows = self.numbers(torch.arange(begin, min(begin + batch_rows, self.end), device=self.device))
            meta = self.read(rows)
            chosen = meta[:, COUNT] > 0
            if since is not None:
                chosen &= meta[:, MARK] >= since
            chosen = chosen.nonzero().flatten()
            if chosen.numel():
                yield rows[chosen], meta[chosen]

    def expired(self, now: int, ttl: int, budget_rows: int | None = None) -> Iterator[Tensor]:
        """Yield rows with now - last seen >= ttl, piece by piece, from where the last walk stopped.

        Looks at `budget_rows` rows (None: at all). The caller may remove what it is given before it goes on.
        """
        left = self.end if budget_rows is None else min(budget_rows, self.end)
        while left > 0:
            if self.cursor >= self.end:
                self.cursor = 0
            begin = self.cursor
            self.cursor = min(begin + min(left, SCAN_ROWS), self.end)
            left -= self.cursor - begin
            yield self._expired(now - ttl, begin, self.cursor)

    def _expired(self, limit: int, begin: int, end: int) -> Tensor:
        found = [torch.empty(0, dtype=torch.int64, device=self.device)]
        for _, first, count in self._rows.extents.spans(self._table, begin, end):
            for row, meta in self._store.meta_of(first, first + count):
                old = (meta[:, COUNT] > 0) & (meta[:, LAST_SEEN] <= limit)
                found.append(old.nonzero().flatten() + row)
        return torch.cat(found)

    def unused_spans(self) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of rows that were given to the table and never taken."""
        capacity = self._rows.extents.capacity[self._table]
        for _, row, count in self._rows.extents.spans(self._table, self.end, capacity):
            yield row, row + count

    def provide(self, end: int, *, limited: bool) -> None:
        """Provide memory for places [0, end). Raises torch.OutOfMemoryError."""
        if end > self._rows.extents.capacity[self._table]:
            self._rows.provide({self._table: end}, limited=limited)

    def spans(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return (begin, end) of the rows at places [begin, end)."""
        return [(row, row + count) for _, row, count in self._rows.extents.spans(self._table, begin, end)]
