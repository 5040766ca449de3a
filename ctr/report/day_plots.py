"""Draw plots over days: quality of each day before it was trained on, and changes of tables, time and model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from tessera.ctr.report.plot import (
    DASHES,
    GRID,
    INK,
    SERIES,
    Plot,
    Table,
    canvas,
    inline_svg,
    legend_above,
    short_number,
    unit_of,
)
from tessera.ctr.report.steps import evenly, four_digits

Days = list[dict[str, Any]]
TICKS = 6
# Parts of a day's rows: label of the curve, and where the day keeps their metrics ("" is the day itself).
PARTS = (("all rows", ""), ("known ids only", "known"), ("with new ids", "new"))


def quality_plots(days: Days) -> list[Plot]:
    """Plot AUC and logloss of all rows and of those with and without new ids, normalized entropy, calibration."""
    plots = [
        _parts_plot(days, "auc", "AUC", "AUC"),
        _parts_plot(days, "logloss", "Logloss", "logloss"),
        _entropy_plot(days),
        _calibration_plot(days),
    ]
    return [plot for plot in plots if plot is not None]


def operation_plots(days: Days) -> list[Plot]:
    """Plot rows and bytes of tables, ids that came and went, rows of the day, speed, minutes, published bytes."""
    plots = [_tables_plot(days), _ids_plot(days), _rows_plot(days), _speed_plot(days), _time_plot(days)]
    plots.append(_published_plot(days))
    return [plot for plot in plots if plot is not None]


def column(days: Days, *keys: str) -> np.ndarray:
    """Return a number of each day, reached by keys, float64 [days]; NaN if a day lacks it."""
    values = []
    for day in days:
        value: Any = day
        for key in filter(None, keys):
            value = value.get(key) if isinstance(value, dict) else None
        values.append(float("nan") if value is None else float(value))
    return np.array(values, dtype=np.float64)


def short_names(days: Days) -> list[str]:
    """Return names of the days for an axis: without the year if all are of one, hours as 05h."""
    names = [day["partition"] for day in days]
    found = [re.fullmatch(r"(\d{4})-(\d\d-\d\d)(?:T(\d\d))?", name) for name in names]
    dates = [match for match in found if match]
    if len(dates) < len(names):
        return names
    one_year = len({match[1] for match in dates}) == 1
    shown = [match[2] if one_year else f"{match[1]}-{match[2]}" for match in dates]
    return [f"{day} {match[3]}h" if match[3] else day for day, match in zip(shown, dates, strict=True)]


def _parts_plot(days: Days, key: str, title: str, label: str) -> Plot | None:
    values = {name: column(days, part, key) for name, part in PARTS}
    values = {name: one for name, one in values.items() if np.isfinite(one).any()}
    if "all rows" not in values:
        return None
    with canvas() as (figure, [axes]):
        for at, (name, one) in enumerate(values.items()):
            axes.plot(one, color=SERIES[at], linestyle=DASHES[at], marker=_marker(days), label=name)
        _mark_held(axes, days, values["all rows"])
        finish_days(axes, days, label)
    ends = ", ".join(f"{name} {_last(one):.4f}" for name, one in values.items())
    return _plot(days, f"day-{key}", title, "Of the model of the days before, on each day.", figure, ends, values)


def _entropy_plot(days: Days) -> Plot | None:
    values = column(days, "normalized_entropy")
    if not np.isfinite(values).any():
        return None
    with canvas() as (figure, [axes]):
        axes.plot(values, color=SERIES[0], marker=_marker(days))
        _mark_held(axes, days, values)
        finish_days(axes, days, "logloss / entropy")
    caption = "Logloss relative to always predicting the day's rate; below 1 the model knows more than that."
    ends = f"last {_last(values):.4f}"
    return _plot(days, "day-entropy", "Normalized entropy", caption, figure, ends, {"normalized entropy": values})


def _calibration_plot(days: Days) -> Plot | None:
    values = {name: column(days, part, "calibration") for name, part in PARTS}
    values = {name: one for name, one in values.items() if np.isfinite(one).any()}
    if "all rows" not in values:
        return None
    with canvas() as (figure, [axes]):
        axes.axhline(1, color=INK, linewidth=1, linestyle=":", label="ideal")
        for at, (name, one) in enumerate(values.items()):
            axes.plot(one, color=SERIES[at], linestyle=DASHES[at], marker=_marker(days), label=name)
        _mark_held(axes, days, values["all rows"])
        finish_days(axes, days, "predicted / observed")
    caption = "Predicted positives over observed ones; above 1 the model promised too much."
    return _plot(
        days, "day-calibration", "Calibration", caption, figure, f"last {_last(values['all rows']):.4f}", values
    )


def _tables_plot(days: Days) -> Plot | None:
    rows, held = column(days, "tables", "rows"), column(days, "tables", "bytes")
    if not np.isfinite(rows).any():
        return None
    unit, unit_name = unit_of(np.nanmax(held))
    with canvas(2, 2.9) as (figure, [axes, below]):
        axes.plot(rows, color=SERIES[0], marker=_marker(days))
        below.plot(held / unit, color=SERIES[1], marker=_marker(days))
        _from_zero(axes, "rows")
        _from_zero(below, unit_name)
        finish_days(below, days, unit_name)
    values = {"rows": rows, "bytes": held}
    caption = "Rows of all embedding tables after each day, and the bytes they take."
    return _plot(days, "day-tables", "Tables", caption, figure, f"last {_last(rows):,.0f} rows", values)


def _ids_plot(days: Days) -> Plot | None:
    values = {"new": column(days, "tables", "new"), "expired": column(days, "tables", "expired")}
    if not any(np.isfinite(one).any() for one in values.values()):
        return None
    with canvas() as (figure, [axes]):
        _bars(axes, values, stacked=False)
        _from_zero(axes, "ids")
        finish_days(axes, days, "ids")
    ends = ", ".join(f"{_last(one):,.0f} {name}" for name, one in values.items())
    return _plot(days, "day-ids", "New and expired ids", "Ids that each day brought and let go.", figure, ends, values)


def _rows_plot(days: Days) -> Plot | None:
    rows = column(days, "rows")
    if not np.isfinite(rows).any():
        return None
    values = {"rows": rows}
    rate = column(days, "observed_rate")
    values |= {"observed rate": rate} if np.isfinite(rate).any() else {}
    share = column(days, "new", "rows") / np.where(rows > 0, rows, np.nan)
    values |= {"rows with new ids": share} if np.isfinite(share).any() else {}
    with canvas(2, 2.9) as (figure, [axes, below]):
        _bars(axes, {"rows": rows})
        _from_zero(axes, "rows")
        for at, name in enumerate(list(values)[1:], start=1):
            below.plot(values[name], color=SERIES[at], linestyle=DASHES[at], marker=_marker(days), label=name)
        below.set_ylim(0, None)
        below.yaxis.set_major_locator(MaxNLocator(4))
        below.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        finish_days(below, days, "share")
    caption = (
        "Rows of each day, the share of label 1 by weight, and the share of rows with an id that the tables did not "
        "know."
    )
    return _plot(days, "day-rows", "Rows", caption, figure, f"last {_last(rows):,.0f} rows", values)


def _speed_plot(days: Days) -> Plot | None:
    speed = column(days, "samples_per_second")
    if not np.isfinite(speed).any():
        return None
    with canvas() as (figure, [axes]):
        axes.plot(speed, color=SERIES[0], marker=_marker(days))
        _from_zero(axes, "samples/s")
        finish_days(axes, days, "samples/s")
    ends = f"{np.nanmedian(speed):,.0f} at the median"
    return _plot(days, "day-speed", "Speed", "Training, over all ranks.", figure, ends, {"samples per second": speed})


def _time_plot(days: Days) -> Plot | None:
    parts = (("training", "train_seconds"), ("evaluation", "evaluate_seconds"))
    values = {name: column(days, key) for name, key in parts}
    values = {name: one for name, one in values.items() if np.isfinite(one).any()}
    if not values:
        return None
    unit = "minutes" if max(np.nanmax(one) for one in values.values()) >= 60 else "seconds"
    values = {name: one / (60 if unit == "minutes" else 1) for name, one in values.items()}
    with canvas() as (figure, [axes]):
        _bars(axes, values, stacked=True)
        _from_zero(axes, unit)
        finish_days(axes, days, unit)
    total = np.sum([np.nan_to_num(one) for one in values.values()], axis=0)
    ends = f"{np.median(total):.1f} {unit} at the median"
    caption = f"Time of training and of evaluation, in {unit}."
    return _plot(days, "day-time", "Time", caption, figure, ends, values)


def _published_plot(days: Days) -> Plot | None:
    held = column(days, "published_bytes")
    kinds = [kind for kind in ("full", "delta") if any(day.get("published") == kind for day in days)]
    if not kinds or not np.isfinite(held).any():
        return None
    unit, unit_name = unit_of(np.nanmax(held))
    values = {k: np.where([day.get("published") == k for day in days], held, np.nan) for k in kinds}
    with canvas() as (figure, [axes]):
        _bars(axes, {kind: one / unit for kind, one in values.items()}, stacked=True)
        _from_zero(axes, unit_name)
        finish_days(axes, days, unit_name)
    counted = ", ".join(f"{int(np.isfinite(one).sum())} {kind}" for kind, one in values.items())
    caption = "Bytes of what serving was given: the full model, or the rows that changed since."
    return _plot(days, "day-published", "Published", caption, figure, counted, values)


def _bars(axes: Axes, values: dict[str, np.ndarray], *, stacked: bool = False) -> None:
    places = np.arange(len(next(iter(values.values()))))
    width = 0.8 if stacked or len(values) == 1 else 0.8 / len(values)
    below = np.zeros(len(places))
    for at, (name, one) in enumerate(values.items()):
        heights = np.nan_to_num(one)
        shift = 0 if stacked or len(values) == 1 else (at - (len(values) - 1) / 2) * width
        bottom, label = below if stacked else None, name if len(values) > 1 else None
        axes.bar(places + shift, heights, width, bottom=bottom, color=SERIES[at], alpha=0.75, label=label)
        below = below + heights


def _mark_held(axes: Axes, days: Days, values: np.ndarray) -> None:
    """Draw a ring around the value of each day whose model was not kept."""
    held = [at for at, day in enumerate(days) if day["status"] == "held" and np.isfinite(values[at])]
    if held:
        axes.plot(
            held,
            values[held],
            marker="o",
            label="held",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=INK,
            linestyle="none",
        )


def _from_zero(axes: Axes, label: str) -> None:
    axes.set(ylabel=label)
    axes.set_ylim(0, 1 if axes.dataLim.ymax <= 0 else None)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(short_number))


def finish_days(axes: Axes, days: Days, label: str) -> None:
    """Put days along x, a band over skipped days, `label` along y, and a legend that covers nothing."""
    names = short_names(days)
    shown = list(range(len(days) - 1, -1, -max(1, -(-(len(days) - 1) // (TICKS - 1)))))  # the last day is one
    axes.set(ylabel=label, xlim=(-0.6, len(days) - 0.4))
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: names[round(at)] if 0 <= round(at) < len(names) else ""))
    for one in axes.figure.axes:
        for at, day in enumerate(days):
            if day.get("status") == "skipped":
                one.axvspan(at - 0.5, at + 0.5, color=GRID, alpha=0.6, linewidth=0, zorder=0)
        legend_above(one)


def _marker(days: Days) -> str | None:
    return "o" if len(days) <= 40 else None


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])


def _plot(
    days: Days, name: str, title: str, caption: str, figure: Any, ends: str, values: dict[str, np.ndarray]
) -> Plot:
    names = [day["partition"] for day in days]
    description = f"{title} over {len(days)} days, {names[0]} to {names[-1]}: {ends}."
    rows = [[names[at], *(four_digits(one[at]) for one in values.values())] for at in evenly(len(days))]
    points: dict[str, dict[str, np.ndarray | list]] = {key: {"day": names, "value": one} for key, one in values.items()}
    return Plot(name, title, caption, inline_svg(figure, name, description), Table(["day", *values], rows), points)
