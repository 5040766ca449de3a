"""Where things lie in the message that a rank sends to each other one: a header, then room for ids and what goes with
them.

All messages of one exchange are equally long, so none waits for sizes. How many ids there is room for follows from what
the messages before told, which all ranks have read alike: the mean, and six standard deviations more, as mixed ids fall
to owners by chance; or the most that went from one rank to another lately. What does not fit goes in a second exchange.

Of which kind an id is (of which table, or feature) follows from how many of each there are, in the header; or, with
more kinds than ids, from a number beside each id.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

WORD = 8  # bytes; messages are of int64
RECENT = 32  # exchanges that the room follows
DEVIATIONS = 6
#: First words of a header: the ids in this message; those of its sender for all ranks, and the most for one of them.
PART, TOTAL, LARGEST = range(3)
FIXED = 3


def room_for(mean: float, largest: int = 0) -> int:
    """Return for how many ids a message has room. mean: ids from one rank to another; largest: the most lately."""
    expected = math.ceil(mean + DEVIATIONS * math.sqrt(mean)) + DEVIATIONS
    return -(-max(largest, expected) // 4) * 4  # so that columns of 2 bytes end with a word


class RecentSizes:
    """How many ids went from one rank to another in the last exchanges. All ranks have the same."""

    def __init__(self) -> None:
        self._means: deque[float] = deque(maxlen=RECENT)
        self._largest: deque[int] = deque(maxlen=RECENT)

    def note(self, mean: float, largest: int) -> None:
        self._means.append(mean)
        self._largest.append(largest)

    def room(self) -> int:
        """Return for how many ids the next message has room; none before the first."""
        if not self._means:
            return 0
        return room_for(sum(self._means) / len(self._means), max(self._largest))


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
        """Words of the header: FIXED, `told`, and without numbers how many ids are of each kind, int32."""
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


def message_bytes(mean: float, kinds: int, told: int, sizes: Sequence[int]) -> int:
    """Return the bytes of a message in the steady state; the arguments as above."""
    return WORD * MessageLayout(room_for(mean), kinds, told, tuple(sizes)).words
