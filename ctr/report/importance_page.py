"""The page of a ranking of fields: bars with intervals, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tessera.ctr.report.page import render
from tessera.ctr.report.plot import INK, SERIES, Plot, Table, canvas, inline_svg

SHOWN = 60  # fields of the chart; the table has all


def importance_page(told: Mapping[str, Any], numbers: str) -> str:
    """Return the page of what importance.json (`numbers`) says."""
    fields: Sequence[Mapping[str, Any]] = told["fields"]
    remarks = [f"Importance: {told['meaning']}."]
    if told.get("repeats"):
        remarks.append(
            f"{told['repeats']} permutations of each field, seed {told['seed']}. The intervals (95 %) say how far "
            "another permutation may differ, not another sample of rows."
        )
    elif any(one["low"] is not None for one in fields):
        remarks.append("The intervals (95 %) say how far another sample of rows may differ.")
    if any(len(one["features"]) > 1 for one in fields):
        remarks.append("Features that share a table or are aligned are one field.")
    return render(
        "data.html",
        heading="Ranking",
        title="Importance of fields",
        subtitle=told.get("run", ""),
        lead=_lead(told),
        remarks=remarks,
        numbers=numbers,
        plots=[_chart(fields)] if fields else [],
        tables=[("Fields", "fields", "Most important first.", _table(fields))],
    )


def _lead(told: Mapping[str, Any]) -> str:
    fields = told["fields"]
    rows = f", on {told['rows']:,} rows of {told['split']}" if told.get("rows") else ""
    first, last = fields[0]["name"], fields[-1]["name"]
    return f"By {told['method']}{rows}, {first} is the most important of {len(fields)} fields and {last} the least."


def _chart(fields: Sequence[Mapping[str, Any]]) -> Plot:
    shown = fields[:SHOWN]
    places, values = np.arange(len(shown))[::-1], np.array([one["importance"] for one in shown])
    bounds = [[one[end] if one[end] is not None else np.nan for one in shown] for end in ("low", "high")]
    low, high = np.array(bounds, dtype=float)
    with canvas(height_inches=0.8 + 0.17 * len(shown)) as (figure, (axes,)):
        axes.barh(places, values, color=SERIES[0], height=0.7)
        axes.hlines(places, low, high, color=INK, linewidth=1)
        axes.set_yticks(places, [_short(one["name"]) for one in shown])
        axes.set_ylim(-0.8, len(shown) - 0.2)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=5)
        said = f"Importance of fields: {shown[0]['name']} has the most, {_number(shown[0]['importance'])}"
        svg = inline_svg(figure, "importance", said)
    points: dict[str, np.ndarray | list] = {"field": [one["name"] for one in shown], "importance": values}
    points |= {"low": low, "high": high}
    caption = "importance with 95 % intervals" if np.isfinite(low).any() else "importance"
    if len(shown) < len(fields):
        caption += f", the first {len(shown)} of {len(fields)}"
    return Plot("importance", "Importance", caption, svg, _table(fields, short=True), {"importance": points})


def _table(fields: Sequence[Mapping[str, Any]], *, short: bool = False) -> Table:
    names = [] if short else list(fields[0].get("metrics", {})) if fields else []
    heads = ["field", "importance", "from", "to", *(f"loss of {name}" for name in names)]
    rows = []
    for one in fields:
        numbers = [one["importance"], one["low"], one["high"], *(one["metrics"][name] for name in names)]
        rows.append([one["name"], *("" if value is None else _number(value) for value in numbers)])
    return Table(heads, rows)


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")
