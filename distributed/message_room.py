"""How much room there is in the message that a rank sends to each other one (`kernels/message_layout.py`).

All messages of one exchange are equally long, so none waits for sizes. How many ids there is room for follows from what
the messages before told, which all ranks have read alike: the mean, and six standard deviations more, as mixed ids fall
to owners by chance; or the most that went from one rank to another lately. What does not fit goes in a second exchange.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from tessera.kernels.message_layout import WORD, MessageLayout

RECENT = 32  # exchanges that the room follows
DEVIATIONS = 6


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


def message_bytes(mean: float, kinds: int, told: int, sizes: Sequence[int]) -> int:
    """Return the bytes of a message in the steady state; the arguments as above."""
    return WORD * MessageLayout(room_for(mean), kinds, told, tuple(sizes)).words
