"""Shared parts of plots over steps: their axis, their markers and the table of their numbers."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tessera.ctr.report.curves import Curve
from tessera.ctr.report.plot import Table, short_number

TABLE_ROWS = 12


def finish_steps(axes: Axes, label: str) -> None:
    """Put steps along x, `label` along y, and a legend if anything has a name."""
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def marker(curve: Curve) -> str | None:
    """Return a marker for short curves: a line through few points hides where they are, and through one shows
    nothing."""
    return "o" if len(curve.x) <= 40 else None


def series_table(series: dict[str, np.ndarray], names: tuple[str, ...]) -> Table:
    """Return values of `names` (float64 [steps] each, NaN is a gap) at a few steps: the table beside the plot."""
    columns = ["step", *(name.replace("_", " ") for name in names)]
    rows = [
        [f"{series['step'][at]:,.0f}", *(four_digits(series[name][at]) for name in names)]
        for at in evenly(len(series.get("step", ())))
    ]
    return Table(columns, rows)


def evenly(length: int) -> list[int]:
    """Return at most TABLE_ROWS positions, with the first and the last."""
    return sorted({round(at) for at in np.linspace(0, length - 1, min(length, TABLE_ROWS))}) if length else []


def four_digits(value: float) -> str:
    """Format four digits, or all of a number of five and more; a dash for a gap."""
    if not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
