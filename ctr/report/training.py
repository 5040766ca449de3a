"""Plot how the run went: loss, AUC of the evaluations, learning rates and speed over steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from tessera.ctr.report.curves import Curve, thin_series
from tessera.ctr.report.history import History
from tessera.ctr.report.plot import DASHES, INK, SERIES, Plot, Table, canvas, inline_svg, short_number, split_styles
from tessera.ctr.report.steps import evenly, finish_steps, four_digits, marker, series_table


@dataclass(frozen=True)
class Bound:
    """The best possible auc and logloss on a split."""

    split: str
    values: dict[str, float]


def training_plots(history: History, watched: str, ceiling: dict[str, float] | None) -> list[Plot]:
    """Plot loss, AUC of evaluations, learning rates and speed over steps; those that the log has numbers for.

    ceiling: auc and logloss of the best possible predictions on the split `watched`, drawn as a line.
    """
    bound = Bound(watched, ceiling) if ceiling else None
    plots = [
        _loss_plot(history, bound),
        _auc_plot(history, bound),
        _learning_rate_plot(history),
        _speed_plot(history),
    ]
    return [plot for plot in plots if plot is not None]


def course(history: History) -> list[str]:
    """Return how long training took, how fast it was and where it was best, in a sentence each, as far as the log
    tells."""
    sentences = []
    steps, rows, seconds, speed = (
        history.train.get(name, np.zeros(0)) for name in ("step", "rows", "seconds", "samples_per_second")
    )
    if len(steps) and np.isfinite([rows.sum(), seconds[-1], np.median(speed)]).all():
        time = f"{seconds[-1]:.0f} seconds" if seconds[-1] < 180 else f"{seconds[-1] / 60:.1f} minutes"
        pace = f"{np.median(speed):,.0f} samples/s at the median"
        sentences.append(f"Trained on {rows.sum():,.0f} rows in {steps[-1]:,.0f} steps and {time}; {pace}.")
    auc = history.evaluations.get("valid", {}).get("auc", np.zeros(0))
    if np.isfinite(auc).sum() > 1:
        best = int(np.nanargmax(auc))
        step = history.evaluations["valid"]["step"][best]
        sentences.append(f"Of {len(auc)} evaluations on valid, AUC was highest at step {step:,.0f}: {auc[best]:.4f}.")
    return sentences


def _loss_plot(history: History, bound: Bound | None) -> Plot | None:
    train = _known(history.train, "loss")
    if train is None and not _evaluations(history, "logloss"):
        return None
    with canvas() as (figure, [axes]):
        if train is not None:
            axes.plot(
                train.x,
                train.y,
                color=split_styles(["train"])["train"]["color"],
                linewidth=1,
                marker=marker(train),
                label="training",
            )
        _draw_evaluations(axes, history, "logloss")
        _draw_bound(axes, bound, "logloss")
        finish_steps(axes, "logloss")
    last = "" if train is None else f" Training loss from {train.y[0]:.4f} to {train.y[-1]:.4f}."
    return Plot(
        "loss",
        "Loss",
        "Training loss between two log lines, and logloss of each evaluation.",
        inline_svg(figure, "loss", f"Loss over training steps.{last}"),
        series_table(history.train, ("loss",)),
        ({} if train is None else {"training": {"step": train.x, "logloss": train.y}})
        | _evaluation_points(history, "logloss"),
    )


def _auc_plot(history: History, bound: Bound | None) -> Plot | None:
    evaluations = _evaluations(history, "auc")
    if not evaluations:
        return None
    with canvas() as (figure, [axes]):
        _draw_evaluations(axes, history, "auc")
        _draw_bound(axes, bound, "auc")
        finish_steps(axes, "AUC")
    best = ", ".join(f"{split} {curve.y.max():.4f}" for split, curve in evaluations)
    rows = []
    for split, series in history.evaluations.items():
        for at in evenly(len(series["step"])):
            values = [series[name][at] for name in ("auc", "logloss", "normalized_entropy", "calibration")]
            shown = ["undefined" if np.isnan(value) else four_digits(value) for value in values]
            rows.append([f"{series['step'][at]:,.0f}", split, *shown])
    return Plot(
        "auc",
        "AUC of the evaluations",
        "Streaming AUC, as measured during the run.",
        inline_svg(figure, "auc", f"AUC over training steps. Best: {best}."),
        Table(["step", "split", "AUC", "logloss", "normalized entropy", "calibration"], rows),
        _evaluation_points(history, "auc"),
    )


def _learning_rate_plot(history: History) -> Plot | None:
    names = (("dense_lr", "dense weights"), ("sparse_lr", "embedding rows"))
    shown = [(label, curve) for name, label in names if (curve := _known(history.train, name)) is not None]
    if not shown:
        return None
    values = np.concatenate([curve.y for _, curve in shown])
    with canvas(height_inches=2.7) as (figure, [axes]):
        for (label, curve), colour, dashes in zip(shown, SERIES, DASHES, strict=False):
            axes.plot(curve.x, curve.y, color=colour, linestyle=dashes, marker=marker(curve), label=label)
        if values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        else:
            axes.set_ylim(0, None)
        finish_steps(axes, "learning rate")
    ends = ", ".join(f"{label} from {curve.y[0]:g} to {curve.y[-1]:g}" for label, curve in shown)
    return Plot(
        "learning-rate",
        "Learning rates",
        "Of dense weights and of embedding rows.",
        inline_svg(figure, "learning-rate", f"Learning rates over training steps: {ends}."),
        series_table(history.train, ("dense_lr", "sparse_lr")),
        {label: {"step": curve.x, "learning rate": curve.y} for label, curve in shown},
    )


def _speed_plot(history: History) -> Plot | None:
    speed, wait = (_known(history.train, name) for name in ("samples_per_second", "reader_wait"))
    if speed is None:
        return None
    with canvas(2, 2.7, height_ratios=[2, 1]) as (figure, [axes, below]):
        axes.plot(speed.x, speed.y, color=SERIES[0], marker=marker(speed), linewidth=1)
        axes.set(ylabel="samples/s", ylim=(0, None))
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        if wait is not None:
            below.plot(wait.x, wait.y, color=SERIES[1], marker=marker(wait), linewidth=1)
        below.set(ylim=(0, 1))
        below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        finish_steps(below, "reader wait")
    waited = "" if wait is None else f" Waiting for the reader: {np.median(wait.y):.0%} of the time at the median."
    return Plot(
        "speed",
        "Speed",
        "Samples per second over all ranks, and the share of time that training waited for the reader.",
        inline_svg(figure, "speed", f"Samples per second: {np.median(speed.y):,.0f} at the median.{waited}"),
        series_table(history.train, ("samples_per_second", "reader_wait")),
        {"samples per second": {"step": speed.x, "samples per second": speed.y}}
        | ({} if wait is None else {"reader wait": {"step": wait.x, "share": wait.y}}),
    )


def _known(series: dict[str, np.ndarray], name: str) -> Curve | None:
    if name not in series or not np.isfinite(series[name]).any():
        return None
    return thin_series(series["step"], series[name])


def _evaluations(history: History, name: str) -> list[tuple[str, Curve]]:
    found = [(split, _known(series, name)) for split, series in sorted(history.evaluations.items())]
    return [(split, curve) for split, curve in found if curve is not None]


def _evaluation_points(history: History, name: str) -> dict[str, dict[str, np.ndarray]]:
    return {split: {"step": curve.x, name: curve.y} for split, curve in _evaluations(history, name)}


def _draw_evaluations(axes: Axes, history: History, name: str) -> None:
    curves = dict(_evaluations(history, name))
    for split, style in split_styles(curves).items():
        axes.plot(curves[split].x, curves[split].y, **style, marker=marker(curves[split]), label=split)


def _draw_bound(axes: Axes, bound: Bound | None, name: str) -> None:
    if bound:
        value = bound.values[name]
        label = f"best possible on {bound.split}, {value:.4f}"
        axes.axhline(value, color=INK, linewidth=1, linestyle=":", label=label)
