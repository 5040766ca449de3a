"""Draw Criteo-shaped rows without labels: 13 counts with missing values and 26 columns of Zipf-distributed ids.

Every value is a function of (seed, day, row, column), so any part of any data set can be drawn alone. An id
is a bijective mix of (column, rank, generation): all 64 bits are used, no two ids of a data set are equal,
and the rank can be read back from the id.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tessera.ctr.data.counter_random import bits, key, mix64, uniform, unmix64
from tessera.embedding.errors import ConfigError

COUNT_NAMES = [f"I{i}" for i in range(1, 14)]
ID_NAMES = [f"C{i}" for i in range(1, 27)]

# Distinct ids of C1 to C26 in the Kaggle log of 45.8 million rows.
CRITEO_ROWS = 45_840_617
CRITEO_CARDINALITIES = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194]
CRITEO_CARDINALITIES += [27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
# Shares of missing values by column, and mean and deviation of the counts' logarithms: about those of the
# same log.
MISSING_IDS = {3: 0.034, 4: 0.034, 6: 0.12, 12: 0.034, 16: 0.034, 19: 0.44, 20: 0.44, 21: 0.034, 22: 0.76}
MISSING_IDS |= {24: 0.034, 25: 0.44, 26: 0.44}
MISSING_COUNTS = [0.45, 0.0, 0.21, 0.22, 0.03, 0.22, 0.04, 0.0, 0.04, 0.45, 0.04, 0.77, 0.22]
LOG_MEANS = [0.5, 1.5, 1.8, 1.5, 7.5, 3.5, 1.5, 2.0, 3.5, 0.0, 0.6, -0.5, 1.5]
LOG_DEVIATIONS = [1.1, 1.8, 1.3, 0.9, 1.9, 1.5, 1.3, 0.8, 1.3, 0.6, 0.9, 0.9, 1.0]

SMALL_VOCABULARY = 1000  # vocabularies do not shrink below this size with the number of rows
# Columns with more ids than this in Criteo's log get new ids daily: advertisements and users come and go,
# devices and countries do not.
TURNING_VOCABULARY = 10_000
RANK_BITS, GENERATION_BITS = 40, 18
QUANTILES = 1 << 16
# The purpose of a stream of random numbers; part of its key.
IDS, COUNTS, SCRAMBLE, PHASE = 1, 2, 3, 4


@dataclass(frozen=True)
class SyntheticConfig:
    """Settings that determine a synthetic data set, to the last byte of its columns."""

    rows: int = 400_000  # of all splits or days together; scales the vocabularies by Criteo's ids per row
    days: int = 0  # 0: train, valid and test; otherwise so many days, day=YYYY-MM-DD
    start_date: str = "2026-01-01"
    seed: int = 2026
    valid: float = 0.1  # fraction of the rows, where there are no days
    test: float = 0.1
    # Share of the large columns' ids replaced every day, head and tail alike: about this share of their
    # occurrences is of ids that did not exist the day before.
    new_ids: float = 0.12
    # Radians by which the truth's weights turn per day; at 0.05 their correlation is 0.88 after 10 days.
    drift: float = 0.05
    zipf: float = 1.05  # exponent of the ids' distribution
    # Factor on the large vocabularies; at 3 about as many distinct ids occur per row as in Criteo's log.
    vocabulary: float = 3.0
    base_rate: float = 0.25  # mean probability of a click
    signal: float = 1.5  # standard deviation of the truth's logit: sets how high the ceiling is
    string_ids: bool = False  # ids as 16 hexadecimal digits instead of int64

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the key."""
        share, above_0 = "at least 0 and below 1", "above 0"
        wanted = {
            "rows": (self.rows >= 1, "at least 1"),
            "days": (0 <= self.days < 1 << GENERATION_BITS, f"from 0 to {(1 << GENERATION_BITS) - 1}"),
            "valid": (0 <= self.valid < 1, share),
            "test": (0 <= self.test < 1 - self.valid, "at least 0 and, with valid, below 1"),
            "new_ids": (0 <= self.new_ids < 1, share),
            "drift": (self.drift >= 0, "at least 0"),
            "zipf": (self.zipf > 0, above_0),
            "vocabulary": (0 < self.vocabulary < 1000, "above 0 and below 1000"),
            "base_rate": (0 < self.base_rate < 1, "above 0 and below 1"),
            "signal": (self.signal > 0, above_0),
        }
        for name, (good, expected) in wanted.items():
            if not good:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected {expected}")


@dataclass
class Rows:
    """n rows. raw, rank, generation: int64 [26, n] (generation counts how often the id of a rank was
    replaced); missing: bool [26, n]; counts: float32 [13, n], whole numbers, NaN where missing."""

    raw: np.ndarray
    rank: np.ndarray
    generation: np.ndarray
    missing: np.ndarray
    counts: np.ndarray


class Population:
    """The distribution that rows are drawn from. sizes: number of ids of each of the 26 columns that exist at one
    time."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        share = min(config.rows / CRITEO_ROWS, 1.0) * config.vocabulary
        self.sizes = [max(min(n, SMALL_VOCABULARY), round(n * share)) for n in CRITEO_CARDINALITIES]
        self.turning = [n > TURNING_VOCABULARY and config.new_ids > 0 for n in CRITEO_CARDINALITIES]
        self.scramble = key(config.seed, SCRAMBLE)
        # Columns turn at different times of their cycle.
        self.phase = uniform(bits(key(config.seed, PHASE), np.arange(26, dtype=np.uint64)))
        self.count_table = np.stack(
            [_count_quantiles(*p) for p in zip(LOG_MEANS, LOG_DEVIATIONS, MISSING_COUNTS, strict=True)]
        )

    def draw(self, stream: int, day: int, first_row: int, rows: int) -> Rows:
        """Draw the rows first_row to first_row + rows of a day; `stream` keeps a pilot sample apart from the data."""
        counters = np.arange(first_row, first_row + rows, dtype=np.uint64)
        drawn = Rows(
            raw=np.empty((26, rows), np.int64),
            rank=np.empty((26, rows), np.int64),
            generation=np.zeros((26, rows), np.int64),
            missing=np.zeros((26, rows), bool),
            counts=np.empty((13, rows), np.float32),
        )
        for c in range(26):
            random = bits(key(self.config.seed, stream, day, IDS, c), counters)
            drawn.rank[c] = _zipf_ranks(uniform(random), self.sizes[c], self.config.zipf)
            if day and self.turning[c]:
                drawn.generation[c] = np.floor(self._age(drawn.rank[c], c, day))
            drawn.raw[c] = self._pack(c, drawn.rank[c], drawn.generation[c])
            if c + 1 in MISSING_IDS:
                # The lower 11 bits are those that `uniform` does not use.
                threshold = np.uint64(round(MISSING_IDS[c + 1] * 2048))
                np.less(random & np.uint64(2047), threshold, out=drawn.missing[c])
        for first in range(0, 13, 4):
            random = bits(key(self.config.seed, stream, day, COUNTS, first), counters)
            quarters = random.view(np.uint16).reshape(rows, 4)
            for j in range(first, min(first + 4, 13)):
                drawn.counts[j] = self.count_table[j][quarters[:, j - first]]
        return drawn

    def rows_of(self, raw: np.ndarray, missing: np.ndarray, counts: np.ndarray) -> Rows:
        """Rebuild rows from stored data: ranks and generations are read back from the ids (any id where missing)."""
        packed = unmix64(raw.view(np.uint64)) ^ self.scramble
        rank = (packed & np.uint64((1 << RANK_BITS) - 1)).astype(np.int64)
        generation = (packed >> np.uint64(RANK_BITS)) & np.uint64((1 << GENERATION_BITS) - 1)
        return Rows(raw, np.where(missing, 0, rank), generation.astype(np.int64), missing, counts)

    def new_today(self, column: int, rank: np.ndarray, day: int) -> np.ndarray | None:
        """Return bool [n] that marks ranks whose id did not exist the day before; None if none can be: on the first
        day, or in a column whose ids never change."""
        if not day or not self.turning[column]:
            return None
        age = self._age(rank, column, day)
        age -= np.floor(age)
        return age < self.config.new_ids

    def _age(self, rank: np.ndarray, column: int, day: int) -> np.ndarray:
        """Return a number for each rank whose floor is the generation of its id: it grows by `new_ids` a day, and
        ranks, spread by multiples of the golden section, take their turns evenly."""
        age = rank * 0.6180339887498949
        age += self.phase[column]
        age -= np.floor(age)
        age += day * self.config.new_ids
        return age

    def _pack(self, column: int, rank: np.ndarray, generation: np.ndarray) -> np.ndarray:
        packed = generation.astype(np.uint64)
        packed <<= np.uint64(RANK_BITS)
        packed |= rank.view(np.uint64)
        packed |= np.uint64(column << (RANK_BITS + GENERATION_BITS))
        packed ^= self.scramble
        return mix64(packed).view(np.int64)


def _zipf_ranks(x: np.ndarray, size: int, exponent: float) -> np.ndarray:
    """Return ranks 0 to size - 1 with probability about (rank + 1)^-exponent, from uniform x (overwritten): the power
    law on the real line from 1/2 to size + 1/2 is inverted in closed form and rounded, so that no table is needed."""
    low, high = 0.5, size + 0.5
    if exponent == 1.0:
        x *= np.log(high / low)
        np.exp(x, out=x)
        x *= low
    else:
        power = 1.0 - exponent
        x *= high**power - low**power
        x += low**power
        np.log(x, out=x)
        x /= power
        np.exp(x, out=x)
    x -= 0.5
    return np.minimum(x.astype(np.int64), size - 1)


def _count_quantiles(log_mean: float, log_deviation: float, missing: float) -> np.ndarray:
    """Return float32 [2^16]: floor(exp(normal)) at evenly spaced quantiles, NaN for the first `missing` of them."""
    known = 1.0 - (np.arange(QUANTILES) + 0.5) / QUANTILES
    normal = NormalDist()
    grid = np.linspace(-5.0, 5.0, 2001)
    share = np.array([normal.cdf(z) for z in grid.tolist()])
    z = np.interp(known / (1.0 - missing), share, grid)
    values = np.floor(np.exp(log_mean + log_deviation * z)).astype(np.float32)
    values[known > 1.0 - missing] = np.nan
    return values
