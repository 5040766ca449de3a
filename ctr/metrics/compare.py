"""Compare two models on the same rows: the difference with its confidence interval, in closed form and by paired
bootstrap.

All take the predictions of both models for the same rows in the same order. A difference is that of the second model
minus that of the first. The formulas are in docs/metrics.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tessera.ctr.data.counter_random import bits, key
from tessera.ctr.metrics.score_table import PROBABILITY_EPSILON, run_starts

NAMES = ("auc", "logloss")
BOOTSTRAP = 7  # first word of the key of its random numbers


@dataclass(frozen=True)
class PairedRows:
    """Rows scored by two models, all arrays [rows].

    first, second: floating, probabilities; positive: bool; weight: above 0, or None for 1 each; cluster: int, rows of
    one cluster (a user) belong together, or None.
    """

    first: np.ndarray
    second: np.ndarray
    positive: np.ndarray
    weight: np.ndarray | None = None
    cluster: np.ndarray | None = None

    @property
    def has_both_classes(self) -> bool:
        return bool(self.positive.any() and not self.positive.all())


@dataclass(frozen=True)
class Difference:
    """Difference of two models in a metric. first, second: the metric of either model; low, high: the interval of
    second - first; p_value: two-sided, of no difference (1 where the models agree on every row); standard_error of the
    difference."""

    first: float
    second: float
    standard_error: float
    low: float
    high: float
    p_value: float

    @property
    def value(self) -> float:
        return self.second - self.first


def auc_difference(rows: PairedRows, confidence: float = 0.95) -> Difference | None:
    """Return DeLong's interval of the difference in AUC (DeLong, DeLong, Clarke-Pearson 1988), from the placements
    of all rows, which one sort per model gives (Sun, Xu 2014); with clusters as in Obuchowski 1997. None with one
    class."""
    if not rows.has_both_classes:
        return None
    values, influence = [], []
    for prediction in (rows.first, rows.second):
        auc, one = _auc_influence(prediction, rows)
        values.append(auc)
        influence.append(one)
    difference = influence[1] - influence[0]
    if rows.cluster is not None:
        return _interval(values, _clustered(difference, rows.cluster), confidence)
    # Positives and negatives are two samples: each has its own degrees of freedom.
    variance = sum(_variance(difference[mask]) for mask in (rows.positive, ~rows.positive))
    return _interval(values, variance, confidence)


def logloss_difference(rows: PairedRows, confidence: float = 0.95) -> Difference | None:
    """Return the interval of the mean of the rows' differences in loss, by their spread. None without rows."""
    if not len(rows.positive):
        return None
    losses = [row_loss(prediction, rows.positive) for prediction in (rows.first, rows.second)]
    weight = _weight(rows)
    values = [float(np.dot(weight, loss) / weight.sum()) for loss in losses]
    difference = losses[1] - losses[0]
    influence = weight * (difference - (values[1] - values[0])) / weight.sum()
    variance = _variance(influence) if rows.cluster is None else _clustered(influence, rows.cluster)
    return _interval(values, variance, confidence)


def row_loss(prediction: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the negative log likelihood of each row in nats, clipped as the offline logloss; float64 [rows]."""
    probability = np.clip(prediction.astype(np.float64), PROBABILITY_EPSILON, 1 - PROBABILITY_EPSILON)
    return -np.where(positive, np.log(probability), np.log1p(-probability))


def _auc_influence(prediction: np.ndarray, rows: PairedRows) -> tuple[float, np.ndarray]:
    """Return the AUC, and how much each row adds to it beyond the average row of its class; float64 [rows]."""
    weight = _weight(rows)
    order = np.argsort(prediction, kind="stable")
    starts = run_starts(prediction[order])
    lengths = np.diff(starts, append=len(order))
    placement, share = np.empty(len(order)), np.empty(len(order))
    for own in (rows.positive, ~rows.positive):
        others = np.add.reduceat(np.where(own, 0.0, weight)[order], starts)
        below = (np.cumsum(others) - 0.5 * others) / others.sum()  # half of those that tie
        # A positive wins over the negatives below it, a negative loses to the positives above it.
        won = np.repeat(below if own is rows.positive else 1 - below, lengths)
        mine = own[order]
        placement[order[mine]] = won[mine]
        share[own] = weight[own] / weight[own].sum()
    auc = float(np.dot(share[rows.positive], placement[rows.positive]))
    return auc, share * (placement - auc)


def _weight(rows: PairedRows) -> np.ndarray:
    return np.ones(len(rows.positive)) if rows.weight is None else rows.weight.astype(np.float64)


def _variance(influence: np.ndarray) -> float:
    """Return the variance of the sum of influences that add up to 0: with equal weights the usual s^2 / n."""
    n = len(influence)
    return float(np.dot(influence, influence)) * n / (n - 1) if n > 1 else float("inf")


def _clustered(influence: np.ndarray, cluster: np.ndarray) -> float:
    _, codes = np.unique(cluster, return_inverse=True)
    return _variance(np.bincount(codes, weights=influence))


def _interval(values: list[float], variance: float, confidence: float) -> Difference:
    first, second = values
    error = float(np.sqrt(variance))
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    value = second - first
    # Rounding leaves a trace of a variance where both models order all rows alike.
    p_value = 1.0 if value == 0 else 2 * NormalDist().cdf(-abs(value) / error) if error else 0.0
    return Difference(first, second, error, value - half, value + half, p_value)


def paired_bootstrap(rows: PairedRows, replicates: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """Return differences in AUC and logloss on resampled rows.

    Every row (cluster, if given) is taken Poisson(1) times, the same for both models: for metrics that are ratios of
    sums this is drawing rows with replacement, without drawing a fixed number of them (Chamandy et al. 2012), and a
    row's number does not depend on the others. Replicate k is a function of (seed, k, place of the row) alone.

    Time: one pass over the rows per replicate and model, without sorting. Memory: some 60 bytes per row.

    Returns:
        "auc", "logloss": float64 [replicates]; NaN in "auc" where a replicate has one class.
    """
    loss = row_loss(rows.second, rows.positive) - row_loss(rows.first, rows.positive)
    loss = loss if rows.weight is None else loss * rows.weight
    models = [_SortedClasses.of(prediction, rows.positive) for prediction in (rows.first, rows.second)]
    codes = None if rows.cluster is None else np.unique(rows.cluster, return_inverse=True)[1]
    drawn_from = len(loss) if codes is None else int(codes.max(initial=-1)) + 1
    found = {name: np.full(replicates, np.nan) for name in NAMES}
    for replicate in range(replicates):
        times = _times(drawn_from, key(BOOTSTRAP, seed, replicate))
        times = times if codes is None else times[codes]
        weight = times if rows.weight is None else times * rows.weight
        aucs = [model.auc(weight) for model in models]
        found["auc"][replicate] = aucs[1] - aucs[0]
        found["logloss"][replicate] = np.dot(loss, times) / max(float(weight.sum(dtype=np.float64)), 1e-300)
    return found


# Poisson(1) for each value of 16 random bits: each probability is right to 2^-16.
_POISSON = np.searchsorted(
    65536 * np.cumsum([np.exp(-1) / math.factorial(k) for k in range(10)]), np.arange(65536) + 0.5
).astype(np.uint8)


def _times(n: int, stream: np.uint64) -> np.ndarray:
    """Draw how often each of n items is taken, Poisson(1); uint8 [n]."""
    words = bits(stream, np.arange(-(-n // 4), dtype=np.uint64))
    return _POISSON[words.astype("<u8", copy=False).view("<u2")[:n]]


@dataclass(frozen=True)
class _SortedClasses:
    """The rows of each class sorted by one model's predictions, reused for any weights.

    negatives: rows of label 0 by ascending prediction; positives: rows of label 1 likewise; below, upto: for each of
    these the number of negatives predicted below it, and not above it (None: no ties). All int [..].
    """

    negatives: np.ndarray
    positives: np.ndarray
    below: np.ndarray
    upto: np.ndarray | None

    @staticmethod
    def of(prediction: np.ndarray, positive: np.ndarray) -> _SortedClasses:
        negatives, positives = np.flatnonzero(~positive), np.flatnonzero(positive)
        negatives = negatives[np.argsort(prediction[negatives], kind="stable")]
        positives = positives[np.argsort(prediction[positives], kind="stable")]
        below, upto = (
            np.searchsorted(prediction[negatives], prediction[positives], side) for side in ("left", "right")
        )
        return _SortedClasses(negatives, positives, below, None if np.array_equal(below, upto) else upto)

    def auc(self, weight: np.ndarray) -> float:
        """Return the AUC with the given row weights; floating, or uint8 for how often each row counts."""
        exact = np.int64 if weight.dtype == np.uint8 else np.float64
        beaten = np.zeros(len(self.negatives) + 1, exact)
        np.cumsum(weight[self.negatives], out=beaten[1:])
        mine = weight[self.positives].astype(np.float64)
        won = beaten[self.below] if self.upto is None else 0.5 * (beaten[self.below] + beaten[self.upto])
        pairs = float(mine.sum()) * float(beaten[-1])
        return float(np.dot(mine, won)) / pairs if pairs else float("nan")
