"""Compute the hidden truth behind the synthetic data: the probability of a click given a row.

    logit = bias + sum_c w(id_c) + sum_j f_j(x_j) + sum_{c < c'} <v(id_c), v(id_c')>

The weight w and the three components of v are hashed from the id: no table is stored, whatever the
vocabulary. They are uniform, shrink along the tail of the vocabulary, and turn slowly with the days (drift).
f_j is linear in the logarithm of the count, with a value of its own where the count is missing. Each of the
three sums is scaled to its share of the logit's variance, and the bias is set so that the mean probability is
the base rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tessera.ctr.data.counter_random import bits, key, mix64, uniform
from tessera.ctr.data.synthetic_rows import Population, Rows, SyntheticConfig

# Probabilities are whole multiples of 2^-20, so that a histogram gives the exact AUC and logloss of any
# number of rows.
STEPS = 1 << 20
TAIL_RANK = 256.0  # from about here on effects shrink as 1 / sqrt(rank)
SHARES = {"ids": 0.55, "counts": 0.20, "pairs": 0.25}  # of the logit's variance
PILOT_ROWS = 32768
DATA, PILOT = 1, 2  # streams of rows
LABELS, STRENGTHS, WEIGHTS, TURNED_WEIGHTS = 11, 12, 13, 14  # streams of the truth
SQRT_3 = 3.0**0.5


@dataclass(frozen=True)
class Scales:
    """Factors of the three sums, and the bias; a pilot sample sets them."""

    ids: float = 1.0
    counts: float = 1.0
    pairs: float = 1.0
    bias: float = 0.0


class Truth:
    """Knows every probability. All methods are functions of their arguments and the config alone."""

    def __init__(self, config: SyntheticConfig, population: Population, scales: Scales | None = None) -> None:
        self.config, self.population = config, population
        strengths = uniform(bits(key(config.seed, STRENGTHS), np.arange(26 * 2 + 13 * 2, dtype=np.uint64)))
        # Columns differ in importance, by a factor of up to 3.
        of_ids = (0.5 + strengths[:52]).astype(np.float32).reshape(26, 2)
        self.strength = of_ids[:, [0, 1, 1, 1]]
        logs = np.log1p(population.count_table.astype(np.float64))
        slope = np.where(strengths[52:65] < 0.5, -1, 1) * (0.5 + strengths[52:65])
        self.slope = slope / np.maximum(np.nanstd(logs, axis=1), 0.1)
        self.middle = np.nanmean(logs, axis=1)
        self.if_missing = 2.0 * strengths[65:] - 1.0
        self.streams = [key(config.seed, WEIGHTS), key(config.seed, TURNED_WEIGHTS)]
        self.scales = scales or self._calibrate()

    def steps(self, rows: Rows, day: int) -> np.ndarray:
        """Return the probability of each row, int64 [n] in units of 2^-20, from 1 to 2^20 - 1."""
        logit = self._logit(*self._sums(rows, day))
        return np.clip(np.rint(STEPS / (1.0 + np.exp(-logit))), 1, STEPS - 1).astype(np.int64)

    def labels(self, steps: np.ndarray, day: int, first_row: int) -> np.ndarray:
        """Draw labels by these probabilities, int8 [n], for the rows of the day from first_row on."""
        counters = np.arange(first_row, first_row + len(steps), dtype=np.uint64)
        chance = bits(key(self.config.seed, DATA, day, LABELS), counters) >> np.uint64(44)
        return (chance.view(np.int64) < steps).astype(np.int8)

    def _logit(self, ids: np.ndarray, counts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        scales = self.scales
        return scales.ids * ids + scales.counts * counts + scales.pairs * pairs + scales.bias

    def _sums(self, rows: Rows, day: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (weights of ids, effects of counts, pairs of ids), float64 [n] each, before scaling."""
        n = rows.raw.shape[1]
        total, squares = np.zeros((n, 4), np.float32), np.zeros((n, 4), np.float32)
        angle = self.config.drift * day
        for c in range(26):
            effect = _hashed(rows.raw[c], self.streams[0])
            if angle:
                effect *= np.float32(np.cos(angle))
                effect += np.float32(np.sin(angle)) * _hashed(rows.raw[c], self.streams[1])
            shrink = rows.rank[c].astype(np.float32)
            shrink /= np.float32(TAIL_RANK)
            shrink += np.float32(1)
            np.sqrt(shrink, out=shrink)
            np.divide(np.float32(1), shrink, out=shrink)
            shrink[rows.missing[c]] = 0
            effect *= shrink[:, None]
            effect *= self.strength[c]
            total += effect
            effect *= effect
            squares += effect
        pairs = total * total
        pairs -= squares
        pairs_sum = 0.5 * (pairs[:, 1].astype(np.float64) + pairs[:, 2] + pairs[:, 3])
        return total[:, 0].astype(np.float64), self._count_sum(rows.counts), pairs_sum

    def _count_sum(self, counts: np.ndarray) -> np.ndarray:
        total = np.zeros(counts.shape[1])
        for j in range(13):
            effect = np.log(counts[j] + np.float32(1)).astype(np.float64)
            effect -= self.middle[j]
            effect *= self.slope[j]
            effect[np.isnan(effect)] = self.if_missing[j]
            total += effect
        return total

    def _calibrate(self) -> Scales:
        rows = self.population.draw(PILOT, 0, 0, PILOT_ROWS)
        sums = dict(zip(("ids", "counts", "pairs"), self._sums(rows, 0), strict=True))
        factors = {name: self.config.signal * SHARES[name] ** 0.5 / np.std(sums[name]) for name in sums}
        logit = sum(factors[name] * sums[name] for name in sums)
        low, high = -100.0, 100.0
        for _ in range(60):
            bias = (low + high) / 2
            above = np.mean(1.0 / (1.0 + np.exp(-np.clip(logit + bias, -500, 500)))) > self.config.base_rate
            low, high = (low, bias) if above else (bias, high)
        return Scales(**{name: float(factor) for name, factor in factors.items()}, bias=bias)


def _hashed(raw: np.ndarray, stream: np.uint64) -> np.ndarray:
    """Return four independent values per id, uniform with mean 0 and variance 1: float32 [n, 4]."""
    hashed = raw.view(np.uint64) ^ stream
    values = mix64(hashed).view(np.int16).astype(np.float32).reshape(-1, 4)
    values *= np.float32(SQRT_3 / 32768)
    return values
