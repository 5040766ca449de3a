"""Compute the points that a report draws, from a table of scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tessera.ctr.metrics.score_table import CalibrationBins, ScoreTable

POINTS = 500


@dataclass(frozen=True)
class Curve:
    """x, y: float64 [points], x ascending."""

    x: np.ndarray
    y: np.ndarray

    def first_reaching(self, x: np.ndarray) -> np.ndarray:
        """Return y at the first point not below each x."""
        return self.y[np.minimum(np.searchsorted(self.x, x), len(self.x) - 1)]

    def last_within(self, x: np.ndarray) -> np.ndarray:
        """Return y at the last point not above each x; the curve must begin at or before it."""
        return self.y[np.searchsorted(self.x, x, side="right") - 1]

    def keep(self, chosen: np.ndarray) -> Curve:
        """Return the chosen points (ascending, possibly repeated) with both ends."""
        chosen = np.unique(np.concatenate([[0], np.clip(chosen, 0, len(self.x) - 1), [len(self.x) - 1]]))
        return Curve(self.x[chosen], self.y[chosen])


def roc_curve(table: ScoreTable) -> Curve:
    """Return false positive rate -> true positive rate, from (0, 0) to (1, 1). Needs both classes."""
    true = np.concatenate([[0.0], np.cumsum(table.positive[::-1])])
    false = np.concatenate([[0.0], np.cumsum(table.negative[::-1])])
    return Curve(false / false[-1], true / true[-1])


def pr_curve(table: ScoreTable) -> Curve:
    """Return recall -> precision, from the highest prediction on. Needs both classes."""
    true = np.cumsum(table.positive[::-1])
    selected = true + np.cumsum(table.negative[::-1])
    return Curve(true / true[-1], true / selected)


def thin_roc(curve: Curve, points: int = POINTS) -> Curve:
    """Return at most `points` points of the curve, even in the length travelled along both axes."""
    travelled = curve.x + curve.y
    return curve.keep(np.searchsorted(travelled, np.linspace(0, 2, points - 1)))


def thin_pr(curve: Curve, points: int = POINTS) -> Curve:
    """Return at most `points` points of the curve: even in recall, and a fifth of them at the steep beginning."""
    head = np.geomspace(1, max(2, len(curve.x)), points // 5).astype(np.int64)
    even = np.searchsorted(curve.x, np.linspace(0, 1, points - points // 5 - 2))
    return curve.keep(np.concatenate([head, even]))


def thin_series(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> Curve:
    """Return a noisy series as the means of at most `points` equal stretches; gaps (NaN) are left out."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= points:
        return Curve(x, y)
    starts = np.arange(points) * len(x) // points
    lengths = np.diff(starts, append=len(x))
    return Curve(np.add.reduceat(x, starts) / lengths, np.add.reduceat(y, starts) / lengths)


def wilson_interval(bins: CalibrationBins) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95% interval of each bin's observed rate, from the number of rows of equal weight that would be as
    sure."""
    z, rows, rate = 1.96, bins.effective_rows, bins.observed
    centre = (rate + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * np.sqrt(rate * (1 - rate) / rows + (z / (2 * rows)) ** 2)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def histogram(table: ScoreTable, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight of negatives and of positives between the edges. float64 [edges - 1] each."""
    negative, _ = np.histogram(table.score, edges, weights=table.negative)
    positive, _ = np.histogram(table.score, edges, weights=table.positive)
    return negative, positive
