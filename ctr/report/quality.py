"""Plot how good the predictions are: ROC, precision and recall, calibration, spread by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from tessera.ctr.metrics.score_table import CalibrationBins, ScoreTable
from tessera.ctr.report.curves import Curve, histogram, pr_curve, roc_curve, thin_pr, thin_roc, wilson_interval
from tessera.ctr.report.plot import (
    DASHES,
    INK,
    SERIES,
    Plot,
    Table,
    canvas,
    inline_svg,
    legend_above,
    short_number,
    split_styles,
)

HISTOGRAM_BINS = 50
FALSE_POSITIVE_RATES = np.array([0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
RECALLS = np.array([0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])


@dataclass(frozen=True)
class Histogram:
    """edges: [bins + 1]; negative, positive: weight of either class in each bin, [bins]. All float64."""

    edges: np.ndarray
    negative: np.ndarray
    positive: np.ndarray

    @staticmethod
    def of(table: ScoreTable, edges: np.ndarray) -> Histogram:
        return Histogram(edges, *histogram(table, edges))


@dataclass(frozen=True)
class ThinCurve(Curve):
    """A curve of at most 500 points. `at`: values at the rates of the table below its plot, float64 [rates]."""

    at: np.ndarray


@dataclass(frozen=True)
class SplitCurves:
    """Data for the plots of one split, kept after its rows are released.

    roc and pr are None unless both classes are there. `decades`: the calibration plot is on logarithmic axes, and
    `spread`, the histogram below it, is too.
    """

    split: str
    metrics: dict[str, Any]
    roc: ThinCurve | None
    pr: ThinCurve | None
    bins: CalibrationBins
    decades: bool
    spread: Histogram
    predictions: Histogram


def split_curves(split: str, table: ScoreTable, metrics: dict[str, Any]) -> SplitCurves:
    """Compute curves of at most 500 points and histograms of one split; `table` may be empty or of one class."""
    thin = _thin_curves(table) if table.has_both_classes else (None, None)
    low, high = (float(table.score[0]), float(table.score[-1])) if len(table.score) else (0.0, 1.0)
    # Bins of a histogram need some width where every prediction is the same.
    if high - low < 1e-6:
        low, high = max(0.0, low - 0.01), min(1.0, high + 0.01)
    even = np.linspace(low, high, HISTOGRAM_BINS + 1)
    bins = table.calibration_bins()
    decades = _spans_decades(bins)
    # Below half of the lowest bin's mean lies next to nothing, and the axis ends there.
    spread = np.geomspace(bins.mean_prediction[0] / 2, high, HISTOGRAM_BINS + 1) if decades else even
    return SplitCurves(
        split=split,
        metrics=metrics,
        roc=thin[0],
        pr=thin[1],
        bins=bins,
        decades=decades,
        spread=Histogram.of(table, spread),
        predictions=Histogram.of(table, even),
    )


def _thin_curves(table: ScoreTable) -> tuple[ThinCurve, ThinCurve]:
    roc, pr = roc_curve(table), pr_curve(table)
    thin, few = thin_roc(roc), thin_pr(pr)
    of_roc = ThinCurve(thin.x, thin.y, roc.last_within(FALSE_POSITIVE_RATES))
    return of_roc, ThinCurve(few.x, few.y, pr.first_reaching(RECALLS))


def _spans_decades(bins: CalibrationBins) -> bool:
    """Return whether rates span decades, as click rates do: on linear axes most bins would share a corner."""
    if not len(bins.rows) or not bins.observed.min() > 0:
        return False
    return bool(bins.mean_prediction[-1] > 20 * bins.mean_prediction[0] > 0)


def roc_plot(splits: list[SplitCurves]) -> Plot | None:
    shown = [(one, one.roc) for one in splits if one.roc is not None][: len(SERIES)]
    styles = split_styles(one.split for one, _ in shown)
    if not shown:
        return None
    with canvas() as (figure, [axes]):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":", label="chance")
        for one, curve in shown:
            label = f"{one.split}, AUC {one.metrics['auc']:.4f}"
            axes.plot(curve.x, curve.y, **styles[one.split], label=label)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.005))
        axes.legend(loc="lower right")
    aucs = ", ".join(f"{one.split} {one.metrics['auc']:.4f}" for one, _ in shown)
    return Plot(
        "roc",
        "ROC curve",
        "Share of positives found against share of negatives taken along, from the highest prediction on.",
        inline_svg(figure, "roc", f"ROC curve. Area under the curve: {aucs}."),
        Table(
            ["false positive rate", *(f"true positive rate, {one.split}" for one, _ in shown)],
            [
                [f"{rate:g}", *(f"{curve.at[at]:.4f}" for _, curve in shown)]
                for at, rate in enumerate(FALSE_POSITIVE_RATES)
            ],
        ),
        {one.split: {"false positive rate": curve.x, "true positive rate": curve.y} for one, curve in shown},
    )


def pr_plot(splits: list[SplitCurves]) -> Plot | None:
    shown = [(one, one.pr) for one in splits if one.pr is not None][: len(SERIES)]
    styles = split_styles(one.split for one, _ in shown)
    if not shown:
        return None
    with canvas() as (figure, [axes]):
        for one, curve in shown:
            label = f"{one.split}, PR-AUC {one.metrics['pr_auc']:.4f}"
            axes.plot(curve.x, curve.y, **styles[one.split], label=label, drawstyle="steps-pre")
        base = shown[0][1].y[-1]
        axes.axhline(base, color=INK, linewidth=1, linestyle=":", label=f"random order, {base:.4f}")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.005))
        axes.legend(loc="upper right")
    areas = ", ".join(f"{one.split} {one.metrics['pr_auc']:.4f}" for one, _ in shown)
    return Plot(
        "pr",
        "Precision and recall",
        "Share of positives among the highest predictions, as more of all positives are reached.",
        inline_svg(figure, "pr", f"Precision over recall. Area: {areas}; a random order reaches {base:.4f}."),
        Table(
            ["recall", *(f"precision, {one.split}" for one, _ in shown)],
            [[f"{recall:g}", *(f"{curve.at[at]:.4f}" for _, curve in shown)] for at, recall in enumerate(RECALLS)],
        ),
        {one.split: {"recall": curve.x, "precision": curve.y} for one, curve in shown},
    )


def calibration_plot(one: SplitCurves) -> Plot | None:
    bins = one.bins
    if not len(bins.rows):
        return None
    lower, upper = wilson_interval(bins)
    with canvas(2, 3.4, height_ratios=[4, 1]) as (figure, [axes, below]):
        _draw_calibration(axes, one, lower, upper)
        colour = split_styles([one.split])[one.split]["color"]
        below.stairs(one.spread.negative + one.spread.positive, one.spread.edges, fill=True, color=colour, alpha=0.5)
        below.set(xlabel="mean predicted rate", ylabel="weight")
        below.yaxis.set_major_locator(MaxNLocator(2))
        below.yaxis.set_major_formatter(FuncFormatter(short_number))
    worst = int(np.abs(bins.mean_prediction - bins.observed).argmax())
    description = (
        f"Observed rate over predicted rate in {len(bins.rows)} bins. Largest gap: predicted "
        f"{bins.mean_prediction[worst]:.4f}, observed {bins.observed[worst]:.4f}."
    )
    columns = (bins.mean_prediction, bins.observed, lower, upper, bins.rows)
    return Plot(
        "calibration",
        "Calibration",
        f"Observed against predicted rate on {one.split}, in {len(bins.rows)} bins of about equal weight, "
        "with 95% intervals from the rows of each bin. Below: where the predictions lie.",
        inline_svg(figure, "calibration", description),
        Table(
            ["predicted", "observed", "95% interval", "rows"],
            [
                [f"{predicted:.4f}", f"{observed:.4f}", f"{low:.4f} – {high:.4f}", f"{rows:,}"]
                for predicted, observed, low, high, rows in zip(*columns, strict=True)
            ],
        ),
        {
            one.split: dict(zip(("predicted", "observed", "low", "high", "rows"), columns, strict=True)),
            "weight of predictions": {
                "edges": one.spread.edges,
                "weight": one.spread.negative + one.spread.positive,
            },
        },
    )


def _draw_calibration(axes: Axes, one: SplitCurves, lower: np.ndarray, upper: np.ndarray) -> None:
    bins = one.bins
    first, last = bins.mean_prediction[0], bins.mean_prediction[-1]
    low = min(first, bins.observed.min()) / 1.3 if one.decades else 0.0
    high = max(last, upper.max(), 1e-3) * 1.05
    if one.decades:
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(short_number))
            axis.set_minor_locator(NullLocator())
    axes.plot([low, high], [low, high], color=INK, linewidth=1, linestyle=":", label="perfect")
    error = np.stack([bins.observed - lower, upper - bins.observed]).clip(0)
    color = split_styles([one.split])[one.split]["color"]
    axes.errorbar(
        bins.mean_prediction, bins.observed, yerr=error, color=color, marker="o", linewidth=1, label=one.split
    )
    axes.set(ylabel="observed rate", xlim=(low, high), ylim=(low, high))
    axes.legend(loc="upper left")


def prediction_plot(one: SplitCurves) -> Plot | None:
    spread = one.predictions
    classes = [("label 0", spread.negative), ("label 1", spread.positive)]
    shown = [(name, weight / weight.sum()) for name, weight in classes if weight.any()]
    if not shown:
        return None
    with canvas(height_inches=3.4) as (figure, [axes]):
        for (name, share), colour, dashes in zip(shown, SERIES, DASHES, strict=False):
            axes.stairs(share, spread.edges, fill=True, color=colour, alpha=0.18)
            axes.stairs(share, spread.edges, color=colour, linestyle=dashes, linewidth=1.3, label=name)
        axes.set(xlabel="prediction", ylabel="share of the class")
        axes.set(xlim=(spread.edges[0], spread.edges[-1]), ylim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        legend_above(axes)  # either class may fill any corner
    starts = np.arange(0, HISTOGRAM_BINS, HISTOGRAM_BINS // 10)
    edges = spread.edges[:: HISTOGRAM_BINS // 10]
    sums = [np.add.reduceat(weight, starts) for _, weight in classes]
    return Plot(
        "predictions",
        "Predictions by class",
        f"How the predictions on {one.split} are spread, each class as a share of itself.",
        inline_svg(figure, "predictions", _describe(spread)),
        Table(
            ["from", "to", "weight, label 0", "weight, label 1"],
            [
                [f"{low:.4f}", f"{high:.4f}", f"{zeros:,.6g}", f"{ones:,.6g}"]
                for low, high, zeros, ones in zip(edges[:-1], edges[1:], *sums, strict=True)
            ],
        ),
        {name: {"edges": spread.edges, "weight": weight} for name, weight in classes},
    )


def _describe(spread: Histogram) -> str:
    middle = (spread.edges[1:] + spread.edges[:-1]) / 2
    means = [
        f"label {label}: {np.average(middle, weights=weight):.4f}"
        for label, weight in enumerate((spread.negative, spread.positive))
        if weight.any()
    ]
    ends = f"{spread.edges[0]:.4f} to {spread.edges[-1]:.4f}"
    return f"Histogram of predictions from {ends}. Mean by class, about: {', '.join(means)}."
