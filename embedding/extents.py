"""Divide the rows of a set among its tables, in stretches that grow as a table does.

A table is given rows by the extent, a stretch of neighbouring row numbers: 64 at first, then as many as it has, up to
2^16. So the rows of one table are walked without those of others, however many tables a set has, and a small table
takes little. Beside its number in the set a row has its place in the table, from 0 on, in the order of first use; a
table's extents ascend, so both orders are the same. Saved states know places alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FIRST_BITS, MOST_BITS = 6, 16  # of the rows of an extent
_FIXED = 1 << (MOST_BITS + 1)  # from this place on all extents are of the largest size
_DOUBLING = MOST_BITS - FIRST_BITS + 2  # extents before it


class Extents:
    """capacity: rows that each table has been given, used or not. end: rows given to all tables."""

    def __init__(self, tables: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.capacity = [0] * tables
        self.end = 0
        self._begins: list[list[int]] = [[] for _ in range(tables)]  # first row of each extent
        self._known: Tensor | None = None  # the same, int64 [tables, most], made when it is asked for
        self._small = torch.tensor([0, *(1 << bits for bits in range(FIRST_BITS, MOST_BITS + 2))], device=device)

    def end_with(self, table: int, rows: int) -> int:
        """Return what `end` will be when the table has been given `rows` rows or a few more."""
        have, end = self.capacity[table], self.end
        while have < rows:
            size = _size_at(have)
            have, end = have + size, end + size
        return end

    def grow(self, table: int, rows: int) -> None:
        """Give the table `rows` rows in all, or a few more. They must have memory."""
        begins = self._begins[table]
        while self.capacity[table] < rows:
            size = _size_at(self.capacity[table])
            begins.append(self.end)
            self.capacity[table] += size
            self.end += size
            self._known = None

    def rows(self, tables: Tensor | int, places: Tensor) -> Tensor:
        """Return the rows int64 [n] at places int64 [n] of tables (int64 [n], or one), below their capacity."""
        number = torch.bucketize(places, self._small, right=True) - 1
        fixed = places >= _FIXED
        number = torch.where(fixed, _DOUBLING - 2 + (places >> MOST_BITS), number)
        first = torch.where(fixed, places >> MOST_BITS << MOST_BITS, self._small[number.clamp(max=_DOUBLING)])
        return self._begins_on_device()[tables, number] + (places - first)

    def _begins_on_device(self) -> Tensor:
        known = self._known
        if known is None:  # another thread may ask, too: it finds the same
            most = max(1, *(len(begins) for begins in self._begins))
            padded = [begins + [0] * (most - len(begins)) for begins in self._begins]
            self._known = known = torch.tensor(padded, device=self._device)
        return known

    def places(self, table: int, rows: Tensor) -> Tensor:
        """Return the places int64 [n] of rows int64 [n] of a table."""
        if not rows.numel():
            return rows
        begins = self._begins[table]
        own = torch.tensor(begins, device=self._device)
        first = torch.tensor([_first(number) for number in range(len(begins))], device=self._device)
        number = torch.bucketize(rows, own, right=True) - 1
        return first[number] + (rows - own[number])

    def spans(self, table: int, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (place, row, count) of stretches of neighbouring rows: the table's places [begin, end) in order."""
        at = begin
        while at < end:
            number = _number(at)
            row = self._begins[table][number] + at - _first(number)
            upto = min(end, _first(number + 1))
            while upto < end and self._begins[table][_number(upto)] == row + upto - at:
                upto = min(end, _first(_number(upto) + 1))
            yield at, row, upto - at
            at = upto


def _number(place: int) -> int:
    """Return the number of the extent that a place is in."""
    if place >= _FIXED:
        return _DOUBLING - 2 + (place >> MOST_BITS)
    return max(0, place.bit_length() - FIRST_BITS)


def _first(number: int) -> int:
    """Return the first place of an extent."""
    if number < _DOUBLING:
        return 0 if number == 0 else 1 << (FIRST_BITS + number - 1)
    return (number - _DOUBLING + 2) << MOST_BITS


def _size_at(place: int) -> int:
    """Return the rows of the extent that begins at a place."""
    number = _number(place)
    return _first(number + 1) - _first(number)
