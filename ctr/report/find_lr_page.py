"""Write the curves of a search for learning rates: a page, and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from tessera.ctr.report.files import json_text
from tessera.ctr.report.page import render
from tessera.ctr.report.plot import INK, SERIES, Plot, Table, canvas, inline_svg, legend_above, short_number
from tessera.ctr.report.rate_curve import RateCurve
from tessera.ctr.report.steps import evenly
from tessera.distributed.atomic import write_text

PAGE, NUMBERS = "report.html", "report.json"


def write_rates(folder: Path, curves: Sequence[RateCurve]) -> None:
    """Write report.html and report.json."""
    told = {one.side: _json(one) for one in curves}
    write_text(folder / NUMBERS, json_text(told) + "\n")
    html = render(
        "data.html",
        heading="Loss while rates grow",
        title=folder.name,
        subtitle="learning rates",
        lead=" ".join(sentence(one) for one in curves),
        remarks=["Each rate grew alone, from first values; the other one was as configured."],
        numbers=NUMBERS,
        plots=[_plot(one) for one in curves if len(one.rate)],
        tables=[],
    )
    write_text(folder / PAGE, html)


def sentence(one: RateCurve) -> str:
    """Return what a curve suggests."""
    why = f" ({one.ended})" if one.ended else ""
    if one.suggested is None:
        return f"{one.key}: the loss did not fall in {len(one.rate)} steps{why}, nothing is suggested."
    return (
        f"{one.key}={one.suggested:.2g} is suggested (configured: {one.configured:g}); from {one.least:.2g} on the "
        f"loss rises, after {len(one.rate)} steps{why}."
    )


def _plot(one: RateCurve) -> Plot:
    with canvas() as (figure, [axes]):
        axes.plot(one.rate, one.loss - one.still, color=SERIES[1], linewidth=0.6, label="step")
        axes.plot(one.rate, one.smooth, color=SERIES[0], label="smoothed")
        if one.suggested is not None:
            axes.axvline(one.suggested, color=INK, linewidth=1, linestyle="--", label="suggested")
        axes.axvline(one.configured, color=INK, linewidth=1, linestyle=":", label="configured")
        axes.set(xscale="log", xlabel=one.key, ylabel="loss - loss at rate 0")
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        legend_above(axes)
        svg = inline_svg(figure, f"rate-{one.side}", sentence(one))
    columns = (one.rate, one.loss, one.still, one.smooth)
    rows = [[f"{column[at]:.4g}" for column in columns] for at in evenly(len(one.rate))]
    points = {"loss": {"rate": one.rate, "loss": one.loss}, "smoothed": {"rate": one.rate, "difference": one.smooth}}
    title = "Dense weights" if one.side == "dense" else "Embedding rows"
    caption = (
        "How far the loss of each step lies from that of a run on the same batches whose rate is next to 0. The "
        "suggestion is where the smoothed difference falls most steeply."
    )
    return Plot(
        f"rate-{one.side}",
        title,
        caption,
        svg,
        Table(["rate", "loss", "loss at rate 0", "difference, smoothed"], rows),
        points,
    )


def _json(one: RateCurve) -> dict[str, Any]:
    columns = {name: np.round(getattr(one, name), 8).tolist() for name in ("loss", "still", "smooth")}
    found = {"key": one.key, "configured": one.configured, "suggested": one.suggested, "ended": one.ended}
    least = one.least if np.isfinite(one.least) else None
    return {**found, "least": least, "rate": one.rate.tolist(), **columns}
