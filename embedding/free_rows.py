"""Keep the numbers of rows that are free again, and give them out, the last freed first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tessera.kernels.host_numbers import on_device


class FreeRows:
    """A stack of row numbers in memory that grows by doubling. `rows` are those on it: int64 [k]."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._stack = torch.empty(0, dtype=torch.int64, device=device)  # the first `_count` count
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        return self._stack[: self._count]

    @property
    def nbytes(self) -> int:
        return self._stack.numel() * 8

    def replace(self, rows: Tensor) -> None:
        """Take over a stack: rows int64 [k], which are copied."""
        self._stack = rows.to(self._stack.device, copy=True)
        self._count = rows.numel()

    def take(self, wanted: int) -> Tensor:
        """Return at most `wanted` rows, the last one first: int64 [k]."""
        taken = min(wanted, self._count)
        self._count -= taken
        return self._stack[self._count : self._count + taken].flip(0)

    def give_back(self, rows: Tensor) -> None:
        """Put rows (int64 [n]) on the stack."""
        count = self._count + rows.numel()
        if count > self._stack.numel():
            grown = self._stack.new_empty(max(count, 2 * self._stack.numel()))
            grown[: self._count] = self.rows
            self._stack = grown
        self._stack[self._count : count] = rows
        self._count = count


class FreeRowsOfTables:
    """A stack for each of many tables, all in one tensor, so that rows of all are taken by a few operations.

    A stack that is full goes on, twice as long, behind all others.

    Attributes:
        counts: of rows on each stack. flat: int64, what stacks lie in. begins: where each does.
    """

    def __init__(self, tables: int, device: torch.device | str = "cpu") -> None:
        self.flat = torch.empty(0, dtype=torch.int64, device=device)
        self.counts, self.begins, self._rooms, self._end = [0] * tables, [0] * tables, [0] * tables, 0

    def tops(self) -> list[int]:
        """Return the place of each table's last freed row in `flat`."""
        return [begin + count - 1 for begin, count in zip(self.begins, self.counts, strict=True)]

    def rows(self, table: int) -> Tensor:
        """Return a table's free rows: int64 [k]."""
        begin = self.begins[table]
        return self.flat[begin : begin + self.counts[table]]

    def nbytes(self, table: int) -> int:
        return self._rooms[table] * 8

    def replace(self, table: int, rows: Tensor) -> None:
        """Take over a table's stack: rows int64 [k], which are copied."""
        self.counts[table] = 0
        self.give_back(table, rows)

    def give_back(self, table: int, rows: Tensor) -> None:
        """Put rows (int64 [n]) on a table's stack."""
        count = self.counts[table] + rows.numel()
        if count > self._rooms[table]:
            self._move(table, max(count, 2 * self._rooms[table]))
        begin = self.begins[table]
        self.flat[begin + self.counts[table] : begin + count] = rows
        self.counts[table] = count

    def give_back_all(self, rows: Tensor, tables: Tensor, of_tables: Sequence[int]) -> None:
        """Put rows on the stacks of tables (int64 [n] each, tables ascending, so many of each)."""
        for table, more in enumerate(of_tables):
            if self.counts[table] + more > self._rooms[table]:
                self._move(table, max(self.counts[table] + more, 2 * self._rooms[table]))
        firsts = [0, *accumulate(of_tables)]
        shifts = [top + 1 - first for top, first in zip(self.tops(), firsts, strict=False)]
        at = torch.arange(rows.numel(), device=rows.device)
        self.flat.index_copy_(0, on_device(shifts, rows.device)[tables] + at, rows)
        self.counts = [count + more for count, more in zip(self.counts, of_tables, strict=True)]

    def _move(self, table: int, room: int) -> None:
        """Let a stack go on behind all others, with room for so many rows."""
        kept, begin = self.rows(table), self._end
        end = begin + room
        if end > self.flat.numel():
            grown = self.flat.new_empty(max(end, 2 * self.flat.numel()))
            grown[:begin] = self.flat[:begin]
            self.flat = grown
        self.flat[begin : begin + kept.numel()] = kept
        self.begins[table], self._rooms[table], self._end = begin, room, end


class FreeRowsOfTable:
    """The stack of one table, as `FreeRows`."""

    def __init__(self, all_tables: FreeRowsOfTables, table: int) -> None:
        self._all, self._table = all_tables, table

    @property
    def rows(self) -> Tensor:
        return self._all.rows(self._table)

    @property
    def nbytes(self) -> int:
        return self._all.nbytes(self._table)

    def replace(self, rows: Tensor) -> None:
        self._all.replace(self._table, rows)

    def give_back(self, rows: Tensor) -> None:
        self._all.give_back(self._table, rows)
