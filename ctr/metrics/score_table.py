"""Summarise a split for the offline metrics: its distinct predictions and the weight at each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tessera.ctr.data.errors import DataError

# The float32 below 1 is 1 - 6e-8, so a saturated prediction reads exactly 1; this caps its logloss at 16.1.
PROBABILITY_EPSILON = 1e-7
CALIBRATION_BINS = 20


@dataclass(frozen=True)
class Rows:
    """Checked rows of positive weight, all arrays of one length. `weight` is None where all rows weigh 1."""

    prediction: np.ndarray
    positive: np.ndarray
    weight: np.ndarray | None
    group: np.ndarray | None


@dataclass(frozen=True)
class CalibrationBins:
    """Bins of about equal weight, by ascending prediction. Equal predictions share a bin; no bin is empty.

    mean_prediction, observed, weight: float64 [bins]; rows: int64 [bins]. effective_rows: float64 [bins], of how many
    rows of equal weight the bin's rates are as sure (Kish): (sum of weights)^2 / sum of squared weights.
    """

    mean_prediction: np.ndarray
    observed: np.ndarray
    weight: np.ndarray
    rows: np.ndarray
    effective_rows: np.ndarray


@dataclass(frozen=True)
class ScoreTable:
    """Distinct predictions, ascending, with the weight of the positive and of the negative rows at each.

    Ties are resolved once, here: every metric is a sum over this table and so does not depend on the order of
    rows (but for the rounding of fractional weights).

    score: floating [distinct]; positive, negative, squared_weight: float64 [distinct]; rows: int64 [distinct].
    """

    score: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    squared_weight: np.ndarray
    rows: np.ndarray
    positive_rows: int

    @property
    def positive_weight(self) -> float:
        return float(self.positive.sum())

    @property
    def negative_weight(self) -> float:
        return float(self.negative.sum())

    @property
    def has_both_classes(self) -> bool:
        return self.positive_weight > 0 and self.negative_weight > 0

    def auc(self) -> float | None:
        if not self.has_both_classes:
            return None
        # A positive beats the negatives below it and half of those that share its score.
        beaten = np.cumsum(self.negative)
        beaten -= 0.5 * self.negative
        return float(np.dot(self.positive, beaten)) / (self.positive_weight * self.negative_weight)

    def pr_auc(self) -> float | None:
        if not self.has_both_classes:
            return None
        precision = np.cumsum(self.positive[::-1])
        precision /= np.cumsum(self.positive[::-1] + self.negative[::-1])
        return float(np.dot(self.positive[::-1], precision)) / self.positive_weight

    def logloss(self) -> float | None:
        if not len(self.score):
            return None
        if self.score[0] < 0 or self.score[-1] > 1:
            found = f"{self.score[0]:g} to {self.score[-1]:g}"
            raise DataError(f"prediction: found values from {found}; expected probabilities in [0, 1]")
        probability = self.score.astype(np.float64)
        np.clip(probability, PROBABILITY_EPSILON, 1 - PROBABILITY_EPSILON, out=probability)
        log = np.log(probability)
        total = float(np.dot(self.positive, log))
        np.negative(probability, out=probability)
        np.log1p(probability, out=log)
        total += float(np.dot(self.negative, log))
        return -total / (self.positive_weight + self.negative_weight)

    def normalized_entropy(self) -> float | None:
        loss = self.logloss()
        if not self.has_both_classes or loss is None:
            return None
        return loss / entropy(self.positive_weight, self.negative_weight)

    def observed_rate(self) -> float | None:
        total = self.positive_weight + self.negative_weight
        return self.positive_weight / total if total else None

    def calibration(self) -> float | None:
        if not self.positive_weight > 0:
            return None
        score = self.score.astype(np.float64, copy=False)
        return float(np.dot(score, self.positive) + np.dot(score, self.negative)) / self.positive_weight

    def expected_calibration_error(self, bins: int = CALIBRATION_BINS) -> float | None:
        if not len(self.score):
            return None
        table = self.calibration_bins(bins)
        return float(np.average(np.abs(table.mean_prediction - table.observed), weights=table.weight))

    def calibration_bins(self, bins: int = CALIBRATION_BINS) -> CalibrationBins:
        weight = self.positive + self.negative
        # The bin of a score is where the middle of its own weight falls, so that ties are never parted.
        middle = np.cumsum(weight)
        middle -= 0.5 * weight
        middle *= bins / (float(weight.sum()) or 1.0)
        bin_of_score = np.minimum(middle.astype(np.int32), bins - 1)

        def total(values: np.ndarray) -> np.ndarray:
            return np.bincount(bin_of_score, weights=values, minlength=bins)

        weights, rows, squares = total(weight), total(self.rows), total(self.squared_weight)
        filled = weights > 0
        weights = weights[filled]
        return CalibrationBins(
            mean_prediction=total(self.score * weight)[filled] / weights,
            observed=total(self.positive)[filled] / weights,
            weight=weights,
            rows=rows[filled].astype(np.int64),
            effective_rows=weights * (weights / squares[filled]),
        )


def entropy(positive_weight: float, negative_weight: float) -> float:
    """Return the logloss, in nats, of always predicting the share of positives. Both weights above 0."""
    total = positive_weight + negative_weight
    shares = np.array([positive_weight, negative_weight]) / total
    return float(-(shares * np.log(shares)).sum())


def check_rows(
    prediction: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None, group: ArrayLike | None = None
) -> Rows:
    """Check the columns of a split and leave out rows of weight 0.

    Args:
        prediction: floating [rows], finite. label: [rows], 0 or 1. weight: [rows], finite, not negative, or
            None. group: [rows] of any sortable dtype, or None.

    Raises:
        DataError: a column of another length, or with a value outside the above; names the column.
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    weight = None if weight is None else np.asarray(weight)
    group = None if group is None else np.asarray(group)
    columns = {"prediction": prediction, "label": label, "weight": weight, "group": group}
    for name, column in columns.items():
        if column is not None and column.shape != (prediction.size,):
            raise DataError(f"{name}: found shape {column.shape}; expected ({prediction.size},), one value a row")
    if not np.issubdtype(prediction.dtype, np.floating):
        prediction = prediction.astype(np.float64)
    _check_finite("prediction", prediction)
    positive = label == 1
    wrong = label.size - int(np.count_nonzero(positive)) - int(np.count_nonzero(label == 0))
    if wrong:
        row = int(np.flatnonzero((label != 0) & (label != 1))[0])
        raise DataError(f"label: row {row} has {label[row]} ({wrong:,} such rows); expected 0 or 1")
    if weight is not None:
        _check_finite("weight", weight)
        if weight.size and weight.min() < 0:
            raise DataError(f"weight: row {int(weight.argmin())} has {weight.min():g}; expected 0 or more")
        if np.all(weight == 1):
            weight = None
        elif weight.min() == 0:
            kept = weight > 0
            prediction, positive, weight = prediction[kept], positive[kept], weight[kept]
            group = None if group is None else group[kept]
    return Rows(prediction, positive, weight, group)


def score_table(rows: Rows) -> ScoreTable:
    """Sort once and add up the weight at each distinct prediction. About 40 bytes per row at the peak."""
    order = np.argsort(rows.prediction)
    score = rows.prediction[order]
    starts = run_starts(score)
    positive = rows.positive[order]
    if rows.weight is None:
        all_weight = np.diff(starts, append=len(score)).astype(np.float64)
        positive_weight = sum_runs(positive, starts)
        negative_weight, squares = all_weight - positive_weight, all_weight
    else:
        weight = rows.weight[order]
        positive_weight = sum_runs(weight * positive, starts)
        negative_weight = sum_runs(weight * ~positive, starts)
        squares = sum_runs(np.square(weight, dtype=np.float64), starts)
    return ScoreTable(
        score=score[starts],
        positive=positive_weight,
        negative=negative_weight,
        squared_weight=squares,
        rows=np.diff(starts, append=len(score)),
        positive_rows=int(np.count_nonzero(rows.positive)),
    )


def _check_finite(name: str, values: np.ndarray) -> None:
    # Finite float32 values have a finite sum in float64: the common case needs no mask of all rows.
    with np.errstate(over="ignore"):
        if np.isfinite(values.sum(dtype=np.float64)):
            return
    wrong = ~np.isfinite(values)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{name}: row {row} has {values[row]} ({wrong.sum():,} such rows); expected a number")


def run_starts(*sorted_keys: np.ndarray) -> np.ndarray:
    """Return the position at which each run of equal keys begins: int64 [runs]."""
    changed = np.zeros(len(sorted_keys[0]), dtype=bool)
    changed[:1] = True
    for keys in sorted_keys:
        changed[1:] |= keys[1:] != keys[:-1]
    return np.flatnonzero(changed)


def sum_runs(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sum of each run in float64. `reduceat` refuses an empty array."""
    return np.add.reduceat(values, starts, dtype=np.float64) if len(starts) else np.zeros(0)


def cumsum_runs(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return running sums (float64) that restart with each run, of values not below 0.

    One running sum over all runs, less what it was before a run, would lose a run of small values behind a large one.
    Here no sum reaches over two runs: in pass j every place takes what lies 2^j before it in its run, so there are as
    many passes as the longest run has binary digits.
    """
    sums = values.astype(np.float64)
    place = np.arange(len(sums)) - np.repeat(starts, np.diff(starts, append=len(sums)))
    distance, longest = 1, int(place.max(initial=0)) + 1
    while distance < longest:
        reached = np.flatnonzero(place >= distance)
        sums[reached] += sums[reached - distance]
        distance *= 2
    return sums
