"""Define a record: all that belongs to one row of a set of tables, in one stretch of bytes.

    values of all groups in plain float32, one group after the other
    their states, float32
    groups of low precision, each as its packed row (`kernels/layout.py`)
    zeros up to a multiple of 8 bytes
    how far the row is decayed      float64 [0, 1 or 2]
    what `before_meta` keeps free
    time last seen, count, id       int64 [3]
    table, mark                     int32 [2]
    zeros up to a multiple of 16 bytes, or of 64 where these are few

So plain values of all groups are read in one piece, and a record begins where vectors may. The count is 0 where no id
has the row.

Where tables decay, the first float64 is the sum of log(1 - rate decay) over all steps that the row's values have seen;
the second, where decay depends on counts, is the row's exponent: what is read is the value times
exp(exponent (sum up to now - sum seen)).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from tessera.kernels.layout import RowLayout

META_BYTES = 32
LAST_SEEN, COUNT, ID, TABLE = 0, 1, 2, 3  # columns of the int64 [4] at `meta_at`; the mark is the upper half of TABLE
_FIRST = 5  # numbers of a record, before those of its groups
_LINE = 64  # bytes of a cache line
_MOST_FOR_LINES = 1 / 6  # of a record may be added so that it touches no line that is not its own


class RecordLayout(NamedTuple):
    """The layout of a record; ops take `numbers`. Made by `record_layout`.

    Attributes:
        groups: where the parts of each group are, in bytes from its `begins`.
        begins: for a plain group 0, for one of low precision where its packed row is.
        meta_at: bytes from the begin of the record to time, count, id, table and mark.
        bytes: size of a record.
        decay_at: bytes to where it is noted how far the row is decayed. decay_floats: float64 there.
    """

    groups: tuple[RowLayout, ...]
    begins: tuple[int, ...]
    meta_at: int
    bytes: int
    decay_at: int = 0
    decay_floats: int = 0

    @property
    def width(self) -> int:
        """Values of all groups."""
        return sum(group.dim for group in self.groups)

    @property
    def plain(self) -> bool:
        """True if all values are float32 in one piece, at the begin of the record."""
        return all(is_plain(group) for group in self.groups)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layout as ops take it (`int[] layout`): groups, meta_at, bytes, decay_at, decay_floats; for each group
        begin and its numbers."""
        return _numbers(self)


@cache
def _numbers(layout: RecordLayout) -> tuple[int, ...]:
    found = [len(layout.groups), layout.meta_at, layout.bytes, layout.decay_at, layout.decay_floats]
    assert len(found) == _FIRST
    for group, begin in zip(layout.groups, layout.begins, strict=True):
        found += [begin, *group]
    return tuple(found)


@cache
def _from_numbers(numbers: tuple[int, ...]) -> RecordLayout:
    size = 1 + len(RowLayout._fields)
    of_groups = [numbers[at : at + size] for at in range(_FIRST, _FIRST + numbers[0] * size, size)]
    groups = tuple(RowLayout(*group[1:]) for group in of_groups)
    return RecordLayout(groups, tuple(group[0] for group in of_groups), *numbers[1:_FIRST])


def layout_of(numbers: Sequence[int]) -> RecordLayout:
    """Return the layout of which an op has got the numbers."""
    return _from_numbers(tuple(numbers))


def is_plain(group: RowLayout) -> bool:
    """Return True if a group's values and state are float32."""
    return group.format == "fp32" and not group.moments


def record_layout(groups: Sequence[RowLayout], before_meta: int = 0, decay_floats: int = 0) -> RecordLayout:
    """Return the layout of a record of these groups, each as `plain_layout` or `packed_layout` gives it.

    before_meta: bytes, a multiple of 8, that the caller uses as it likes; ops leave them alone, `records_add` apart,
    which begins them at zero. decay_floats: 0 where rows do not decay, else 1, or 2 where decay depends on counts.
    """
    plain = [group for group in groups if is_plain(group)]
    values_at, state_at = 0, 4 * sum(group.dim for group in plain)
    packed_at = state_at + 4 * sum(group.state_floats for group in plain)
    placed, begins = [], []
    for group in groups:
        if is_plain(group):
            end = state_at + 4 * group.state_floats
            placed.append(group._replace(values_at=values_at, state_at=state_at, moments_at=end, bytes=end))
            begins.append(0)
            values_at, state_at = values_at + 4 * group.dim, end
        else:
            placed.append(group)
            begins.append(packed_at)
            packed_at += group.bytes
    decay_at = _up(packed_at, 8)
    meta_at = decay_at + 8 * decay_floats + before_meta
    size = _up(meta_at + META_BYTES, 16)
    if _up(size, _LINE) - size <= _MOST_FOR_LINES * size:
        size = _up(size, _LINE)
    return RecordLayout(tuple(placed), tuple(begins), meta_at, size, decay_at if decay_floats else 0, decay_floats)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
