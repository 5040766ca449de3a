"""Define each number of a report in a line and a formula. docs/metrics.md says the same at length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """`ideal` is the direction of better, `undefined` when the value is null in report.json."""

    key: str
    title: str
    meaning: str
    formula: str
    ideal: str
    undefined: str


DEFINITIONS = (
    Definition(
        "auc",
        "AUC",
        "Chance that a random positive is predicted above a random negative; ties count half.",
        "Σ wᵢwⱼ ([pᵢ > pⱼ] + ½[pᵢ = pⱼ]) ⁄ Σ wᵢwⱼ over positives i, negatives j",
        "higher is better",
        "one class only",
    ),
    Definition(
        "logloss",
        "Logloss",
        "Mean negative log likelihood of the labels, in nats.",
        "−Σ w (y ln p + (1−y) ln(1−p)) ⁄ Σ w, p clipped to [10⁻⁷, 1−10⁻⁷]",
        "lower is better",
        "no rows",
    ),
    Definition(
        "gauc",
        "GAUC",
        "AUC inside each group (user, session), averaged over groups with both classes by their impressions.",
        "Σ W_g AUC_g ⁄ Σ W_g, where W_g = Σ w of group g",
        "higher is better",
        "no group column, or no group with both classes",
    ),
    Definition(
        "normalized_entropy",
        "Normalized entropy",
        "Logloss relative to always predicting the average rate q; below 1 the model has learned something.",
        "logloss ⁄ −(q ln q + (1−q) ln(1−q)), q = Σ wy ⁄ Σ w",
        "lower is better",
        "one class only",
    ),
    Definition(
        "calibration",
        "Calibration",
        "Predicted positives over observed positives; above 1 the model promises too much.",
        "Σ wp ⁄ Σ wy",
        "1 is ideal",
        "no positives",
    ),
    Definition(
        "pr_auc",
        "PR-AUC",
        "Average precision over recall; the share of positives is what a random order gets.",
        "Σₙ (Rₙ − Rₙ₋₁) Pₙ over distinct predictions n, from the highest",
        "higher is better",
        "one class only",
    ),
    Definition(
        "expected_calibration_error",
        "Expected calibration error",
        "Mean distance of predicted and observed rate over 20 bins of equal weight.",
        "Σ_b (W_b ⁄ W) |mean p − mean y| in bin b",
        "lower is better",
        "no rows",
    ),
    Definition(
        "observed_rate",
        "Observed rate",
        "Share of label 1, by weight.",
        "Σ wy ⁄ Σ w",
        "",
        "no rows",
    ),
    Definition("rows", "Rows", "Scored rows of positive weight.", "Σ [w > 0]", "", "never"),
    Definition("positives", "Positives", "Rows with label 1.", "Σ [w > 0] y", "", "never"),
)


def number(value: float | int | None) -> str:
    """Format a metric with four digits, or a count."""
    if value is None:
        return "undefined"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def percent(value: float | None) -> str:
    """Format a rate with two digits behind the point."""
    return "undefined" if value is None else f"{value:.2%}"
