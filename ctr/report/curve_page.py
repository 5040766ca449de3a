"""The page of a curve over the number of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tessera.ctr.metrics.steering import steering_value
from tessera.ctr.report.page import render
from tessera.ctr.report.plot import Plot, Table, canvas, inline_svg, legend_above, split_styles


def curve_page(told: Mapping[str, Any], numbers: str) -> str:
    """Return the page of what curve.json (`numbers`) says."""
    points, metric = told["points"], told["metric"]
    splits = list(points[0]["splits"])
    values = {
        split: np.array([_number(steering_value(point["splits"][split], metric)) for point in points])
        for split in splits
    }
    counts = np.array([point["fields"] for point in points])
    rows = [
        [f"{point['fields']}", *(f"{values[split][place]:.4f}" for split in splits)]
        for place, point in enumerate(points)
    ]
    table = Table(["fields", *(f"{metric} on {split}" for split in splits)], rows)
    return render(
        "data.html",
        heading="Curve",
        title=f"{metric} over the number of fields",
        subtitle=told["run"],
        lead=f"Trained again on the best {', '.join(map(str, counts))} fields by {told['method']}.",
        remarks=["One run each: with another seed a run differs, too, and small steps of the curve mean nothing."],
        numbers=numbers,
        plots=[_plot(metric, counts, values, table)] if splits else [],
        tables=[("Runs", "runs", "Each is a run folder of its own.", table)],
    )


def _plot(metric: str, counts: np.ndarray, values: Mapping[str, np.ndarray], table: Table) -> Plot:
    with canvas() as (figure, (axes,)):
        for split, style in split_styles(values).items():
            axes.plot(counts, values[split], label=split, marker="o", **style)
        axes.set_xlabel("fields")
        axes.set_ylabel(metric)
        legend_above(axes)
        svg = inline_svg(figure, "curve", f"{metric} over the number of fields, from {counts[0]} to {counts[-1]}")
    drawn = {split: {"fields": counts, metric: one} for split, one in values.items()}
    return Plot("curve", f"{metric} over fields", "of the best model of each run", svg, table, drawn)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
