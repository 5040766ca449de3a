"""Compute exact metrics of a split held in memory. Definitions and formulas: docs/metrics.md.

Every function takes `prediction` [rows] floating, `label` [rows] of 0 and 1, and `weight` [rows] (None: 1
each), and gives None where the metric is undefined. A wrong value in a column raises DataError. Rows of
weight 0 do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tessera.ctr.metrics.score_table import (
    CALIBRATION_BINS,
    Rows,
    ScoreTable,
    check_rows,
    cumsum_runs,
    run_starts,
    score_table,
    sum_runs,
)


@dataclass(frozen=True)
class GroupAuc:
    """AUC inside groups (users, sessions).

    gauc: mean over the scored groups, each with the weight of its rows; None without any scored group.
    mean_auc: the same mean with every scored group counting once (torchrec's GAUC).
    groups, scored_groups: all groups, and those with both classes; scored_rows, scored_weight: rows of the latter,
    and their weight.
    """

    gauc: float | None
    mean_auc: float | None
    groups: int
    scored_groups: int
    scored_rows: int
    scored_weight: float

    def counts(self) -> dict[str, Any]:
        return {
            "total": self.groups,
            "scored": self.scored_groups,
            "scored_rows": self.scored_rows,
            "mean_auc": self.mean_auc,
        }


def auc(prediction: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Return the area under the ROC curve; ties count half."""
    return score_table(check_rows(prediction, label, weight)).auc()


def pr_auc(prediction: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Return the average precision: precision at each distinct prediction, weighted by the recall it adds."""
    return score_table(check_rows(prediction, label, weight)).pr_auc()


def logloss(prediction: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Return the mean negative log likelihood in nats; predictions are clipped to [1e-7, 1 - 1e-7]."""
    return score_table(check_rows(prediction, label, weight)).logloss()


def normalized_entropy(prediction: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Return the logloss over the logloss of always predicting the share of positives."""
    return score_table(check_rows(prediction, label, weight)).normalized_entropy()


def calibration(prediction: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Return the sum of predictions over the sum of labels; 1 is perfect, above 1 predicts too much."""
    return score_table(check_rows(prediction, label, weight)).calibration()


def expected_calibration_error(
    prediction: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None, bins: int = CALIBRATION_BINS
) -> float | None:
    """Return the mean distance of predicted and observed rate over `bins` bins of equal weight."""
    return score_table(check_rows(prediction, label, weight)).expected_calibration_error(bins)


def gauc(prediction: ArrayLike, label: ArrayLike, group: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Return the mean of the groups' AUC, each with the weight of its rows, over groups with both classes.

    Args:
        group: [rows] of any sortable dtype.
    """
    return group_auc(check_rows(prediction, label, weight, group)).gauc


def group_auc(rows: Rows) -> GroupAuc:
    """Return the AUC of every group at once: one sort by group and prediction, then sums over runs of equal keys."""
    assert rows.group is not None, "group_auc needs rows with a group"
    order = np.lexsort((rows.prediction, rows.group))
    score, group, positive = rows.prediction[order], rows.group[order], rows.positive[order]
    weight = np.ones(len(order), dtype=np.float32) if rows.weight is None else rows.weight[order]
    del order
    tie_starts, group_starts = run_starts(group, score), run_starts(group)
    del score, group
    tie_positive = sum_runs(weight * positive, tie_starts)
    tie_negative = sum_runs(weight * ~positive, tie_starts)
    # Every group begins a tie: this is the first tie of each group.
    first_tie = np.searchsorted(tie_starts, group_starts)
    group_positive, group_negative = sum_runs(tie_positive, first_tie), sum_runs(tie_negative, first_tie)
    beaten = cumsum_runs(tie_negative, first_tie) - 0.5 * tie_negative
    wins = sum_runs(tie_positive * beaten, first_tie)
    scored = (group_positive > 0) & (group_negative > 0)
    if not scored.any():
        return GroupAuc(None, None, len(group_starts), 0, 0, 0.0)
    aucs = wins[scored] / (group_positive[scored] * group_negative[scored])
    rows_in_group = np.diff(group_starts, append=len(positive))
    return GroupAuc(
        gauc=float(np.average(aucs, weights=(group_positive + group_negative)[scored])),
        mean_auc=float(aucs.mean()),
        groups=len(group_starts),
        scored_groups=int(scored.sum()),
        scored_rows=int(rows_in_group[scored].sum()),
        scored_weight=float((group_positive + group_negative)[scored].sum()),
    )


def evaluate_predictions(
    prediction: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None, group: ArrayLike | None = None
) -> dict[str, Any]:
    """Return all metrics of a split.

    Returns:
        auc, logloss, gauc, normalized_entropy, calibration, pr_auc, expected_calibration_error, observed_rate: float,
        or None where undefined; rows, positives: counts of rows of positive weight; groups: counts of
        `GroupAuc`, or None without a group column; undefined: why, for each metric that is None.
    """
    rows = check_rows(prediction, label, weight, group)
    return summarise(score_table(rows), None if rows.group is None else group_auc(rows))


def summarise(table: ScoreTable, groups: GroupAuc | None) -> dict[str, Any]:
    """Return the dict of `evaluate_predictions`, from what was computed once."""
    metrics: dict[str, Any] = {
        "auc": table.auc(),
        "logloss": table.logloss(),
        "gauc": groups.gauc if groups else None,
        "normalized_entropy": table.normalized_entropy(),
        "calibration": table.calibration(),
        "pr_auc": table.pr_auc(),
        "expected_calibration_error": table.expected_calibration_error(),
        "observed_rate": table.observed_rate(),
        "rows": int(table.rows.sum()),
        "positives": table.positive_rows,
        "groups": groups.counts() if groups else None,
    }
    metrics["undefined"] = _reasons(metrics, table, groups)
    return metrics


def _reasons(metrics: dict[str, Any], table: ScoreTable, groups: GroupAuc | None) -> dict[str, str]:
    if not len(table.score):
        reason = "no rows of positive weight"
    else:
        reason = "no positives" if not table.positive_weight else "no negatives"
    reasons = {name: reason for name, value in metrics.items() if value is None and name != "groups"}
    if "gauc" in reasons:
        reasons["gauc"] = "no group with both classes" if groups else "no group column"
    return reasons
