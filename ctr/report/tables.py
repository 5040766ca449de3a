"""Report dynamic tables: rows and bytes over steps, what came and went, and the numbers by table."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tessera.ctr.report.curves import POINTS, Curve
from tessera.ctr.report.history import History, TableCounts
from tessera.ctr.report.plot import DASHES, SERIES, Plot, Table, canvas, inline_svg, short_number, unit_of
from tessera.ctr.report.steps import finish_steps, marker, series_table
from tessera.distributed.plan import size

CAME, WENT = ("admitted", "rejected"), ("expired", "evicted")
COLUMNS = (*CAME, *WENT)


def table_plots(history: History) -> list[Plot]:
    """Plot rows and bytes of all tables, and ids admitted, rejected, expired and evicted, over steps."""
    if history.last_tables is None:
        return []
    return [_size_plot(history, history.last_tables), _count_plot(history, history.last_tables)]


def numbers_by_table(counts: TableCounts) -> Table:
    """Return a row for each table, largest in bytes first, and their total."""
    ordered = sorted(counts.by_table.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    return Table(
        ["table", "rows", "bytes", "bytes per row", *COLUMNS],
        [_cells(name, one) for name, one in ordered],
        total=_cells("total", counts.total),
    )


def json_values(counts: TableCounts) -> dict[str, dict[str, int]]:
    """Return the counts by table for report.json, and `total`. A table of that very name is `table total`."""
    by_table = {"table total" if name == "total" else name: one for name, one in counts.by_table.items()}
    return {**by_table, "total": counts.total}


def _cells(name: str, one: dict[str, int]) -> list[str]:
    per_row = f"{one['bytes'] / one['rows']:,.1f}" if one["rows"] else "–"
    return [name, f"{one['rows']:,}", size(one["bytes"]), per_row, *(f"{one[column]:,}" for column in COLUMNS)]


def _size_plot(history: History, last: TableCounts) -> Plot:
    rows, held = (_exact(history.tables, name) for name in ("rows", "bytes"))
    unit, unit_name = unit_of(held.y.max())
    with canvas(2, 2.9) as (figure, [axes, below]):
        axes.plot(rows.x, rows.y, color=SERIES[0], marker=marker(rows))
        axes.set(ylabel="rows")
        _from_zero(axes, rows.y.max())
        below.plot(held.x, held.y / unit, color=SERIES[1], marker=marker(held))
        _from_zero(below, held.y.max() / unit)
        finish_steps(below, unit_name)
    return Plot(
        "table-size",
        "Rows and bytes",
        "Rows in use in all tables, and the bytes they take with optimizer state, id map and admission filter.",
        inline_svg(
            figure,
            "table-size",
            f"Rows and bytes of all tables over training steps. From {rows.y[0]:,.0f} rows and {size(held.y[0])} "
            f"to {last.total['rows']:,} rows and {size(last.total['bytes'])}.",
        ),
        series_table(history.tables, ("rows", "bytes")),
        {"rows": {"step": rows.x, "rows": rows.y}, "bytes": {"step": held.x, "bytes": held.y}},
    )


def _count_plot(history: History, last: TableCounts) -> Plot:
    points = {name: _exact(history.tables, name) for name in COLUMNS}
    styles = dict(zip(COLUMNS, zip(SERIES, DASHES, strict=True), strict=True))
    with canvas(2, 2.9) as (figure, panels):
        for axes, names, label in zip(panels, (CAME, WENT), ("ids", "rows"), strict=True):
            curves = {name: points[name] for name in names}
            for name, curve in curves.items():
                colour, dashes = styles[name]
                axes.plot(curve.x, curve.y, color=colour, linestyle=dashes, marker=marker(curve), label=name)
            _from_zero(axes, max(curve.y.max() for curve in curves.values()))
            finish_steps(axes, label)
        panels[0].set(xlabel="")
    total = ", ".join(f"{last.total[name]:,} {name}" for name in COLUMNS)
    return Plot(
        "table-counts",
        "Ids admitted, rows given up",
        "Unknown ids that got a row (admitted) or did not (rejected), each time they came; rows given up by age "
        "(expired) or at the table's limit (evicted). All since the start of the run.",
        inline_svg(figure, "table-counts", f"Counts of all tables since the start of the run, over steps: {total}."),
        series_table(history.tables, COLUMNS),
        {name: {"step": curve.x, "count": curve.y} for name, curve in points.items()},
    )


def _exact(series: dict[str, np.ndarray], name: str) -> Curve:
    """Return at most POINTS points as they were logged: means would end a running count below its last value."""
    known = np.isfinite(series[name])
    curve = Curve(series["step"][known], series[name][known])
    return curve.keep(np.linspace(0, len(curve.x) - 1, POINTS).round().astype(np.int64))


def _from_zero(axes: Axes, highest: float) -> None:
    """Label an axis with whole numbers from 0 on, also if nothing was counted."""
    top = max(1.0, 1.05 * highest)
    # A count that stays 0 would lie under the axis.
    axes.set_ylim(-0.04 * top, top)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(short_number))
