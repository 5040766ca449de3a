"""Where things lie in the message that a rank sends to each other one: a header, then room for ids and what goes with
them, column after column.

Of which kind an id is (of which table, or feature) follows from where the ids of each kind end, in the header; or, with
more kinds than ids, from a number beside each id. What has no room follows in a second message (`late_units`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

WORD = 8  # bytes; messages are of int64
#: First words of a header: the ids in this message; those of its sender for all ranks, and the most for one of them.
PART, TOTAL, LARGEST = range(3)
FIXED = 3


@dataclass(frozen=True)
class MessageLayout:
    """room: ids in a message; kinds: of ids; told: float64 numbers in the header; sizes: bytes of each column beside
    the ids, none larger than the one before."""

    room: int
    kinds: int
    told: int
    sizes: tuple[int, ...]

    @cached_property
    def numbered(self) -> bool:
        """Whether each id has the number of its kind beside it, as the last column."""
        return self.room > 0 and self.number_bytes * self.room < 4 * self.kinds

    @property
    def number_bytes(self) -> int:
        return 2 if self.kinds <= torch.iinfo(torch.int16).max else 4

    @cached_property
    def header(self) -> int:
        """Words of the header: FIXED, `told`, and without numbers where the ids of each kind end, int32."""
        return FIXED + self.told + (0 if self.numbered else -(-self.kinds // 2))

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Bytes of an id, and of each thing that goes with it."""
        return (WORD, *self.sizes, *([self.number_bytes] if self.numbered else []))

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """The word at which each column begins."""
        found, at = [], self.header
        for size in self.columns:
            found.append(at)
            at += self.room * size // WORD
        return tuple(found)

    @cached_property
    def words(self) -> int:
        return self.header + self.room * sum(self.columns) // WORD

    @cached_property
    def late_units(self) -> tuple[int, ...]:
        """How many int32 each column takes in the second message, whose rows are one id each."""
        return tuple(max(1, size // 4) for size in self.columns)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """What operations take for a layout; `layout_of` undoes it."""
        return self.room, self.kinds, self.told, *self.sizes


def layout_of(numbers: Sequence[int]) -> MessageLayout:
    """Return the layout with these `numbers`."""
    room, kinds, told, *sizes = numbers
    return MessageLayout(room, kinds, told, tuple(sizes))
