"""How many distinct ids some rows of a data set hold, from how often each id of a sample occurs.

The spectrum of a sample is the number of its ids that are in one row, in two rows, and so on. From it follows, exactly,
how many distinct ids fewer rows hold on average if they are drawn from the sample (rarefaction). More rows than the
sample has are a guess: distinct ids grow by a power of the rows (Heaps' law), and with each doubling of the rows the
power falls as it fell from the sample's last but one doubling to its last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

EXACT = 16  # ids in at most so many rows are counted for each number of rows
STEP = 1.15  # from one class of more frequent ids to the next


@dataclass(frozen=True)
class Spectrum:
    """Counts of ids by the rows of a sample that hold them. rows: of the sample; ids: number of rows -> ids, which may
    be means over several samples, and ids in more than 16 rows may be put together by their mean number of rows."""

    rows: int
    ids: Mapping[float, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Distinct ids of the sample."""
        return sum(self.ids.values())

    @property
    def hottest(self) -> float:
        """Share of the rows that hold the most frequent id, or the mean of a few like it."""
        return max(self.ids, default=0) / self.rows

    def distinct(self, rows: float) -> float:
        """Return the expected number of distinct ids in so many rows."""
        if rows > self.rows:
            return self._beyond(rows)
        return sum(count * (1 - _without(self.rows, times, rows)) for times, count in self.ids.items())

    def _beyond(self, rows: float) -> float:
        if not self.ids:
            return 0.0
        quarter, half, whole = self.distinct(self.rows / 4), self.distinct(self.rows / 2), self.total
        before, power = math.log2(half / quarter), math.log2(whole / half)
        decay = min(1.0, power / before) if before > 0 else 0.0
        doublings = math.log2(rows / self.rows)
        # The power that each doubling adds is that of the one before times decay.
        steady = decay > 1 - 1e-6  # where the sum below would divide 0 by 0
        powers = doublings if steady else decay * (1 - decay**doublings) / (1 - decay)
        return whole * 2 ** min(power * powers, doublings)


def _without(rows: int, times: float, drawn: float) -> float:
    """Return the probability that none of `times` rows is among `drawn` of `rows`: C(rows - times, drawn) over C(rows,
    drawn), for numbers that need not be whole."""
    left = rows - times - drawn
    if left < 0:
        return 0.0
    above = math.lgamma(rows - times + 1) + math.lgamma(rows - drawn + 1)
    return math.exp(above - math.lgamma(left + 1) - math.lgamma(rows + 1))


def spectrum_of(rows: int, samples: Sequence[np.ndarray]) -> Spectrum:
    """Return the mean spectrum of samples of `rows` rows. samples: of each, for every id the rows that hold it, int64
    [ids]."""
    every: dict[int, float] = {}
    for times in samples:
        for number, count in enumerate(np.bincount(times).tolist()):
            if number and count:
                every[number] = every.get(number, 0.0) + count / len(samples)
    return Spectrum(rows, _joined(every))


def _joined(every: Mapping[int, float]) -> dict[float, float]:
    """Put the classes of frequent ids together, each at its mean."""
    found: dict[float, float] = {}
    classes: dict[int, tuple[float, float]] = {}
    for times, count in every.items():
        if times <= EXACT:
            found[times] = count
        else:
            place = int(math.log(times / EXACT, STEP))
            ids, rows = classes.get(place, (0.0, 0.0))
            classes[place] = ids + count, rows + times * count
    found |= {rows / ids: ids for ids, rows in classes.values()}
    return dict(sorted(found.items()))
