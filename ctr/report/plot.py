"""Shared parts of all plots: a figure in the page's style, as inline SVG that follows light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tessera.distributed.plan import size

# Matplotlib knows no CSS variables: figures are drawn in these stand-ins, and each becomes var(--name).
INK, GRID = "#010101", "#020202"
SERIES = ("#030301", "#030302", "#030303", "#030304")
DASHES = ("-", "--", "-.", ":")
_VARIABLES = {INK: "ink", GRID: "grid", **{colour: f"series-{n}" for n, colour in enumerate(SERIES, 1)}}

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 8.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    # Names of splits come from the user: a $ in one is no formula.
    "text.parse_math": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
}
WIDTH_INCHES = 4.2


@dataclass(frozen=True)
class Table:
    """Cells as text, the first of a row names it. `total`: a last row that adds the others up."""

    columns: list[str]
    rows: list[list[str]]
    total: list[str] | None = None


@dataclass(frozen=True)
class Plot:
    """One figure of the page.

    `svg` carries its own description for readers who cannot see it. `points`: what is drawn, curve -> axis ->
    numbers [points] (NaN is a gap) or text, for the JSON beside the page.
    """

    name: str
    title: str
    caption: str
    svg: Markup
    table: Table
    points: Mapping[str, Mapping[str, np.ndarray | list]]


def json_points(plots: Iterable[Plot]) -> dict[str, dict]:
    """Return the points of each plot by its name, numbers to six digits, null for a gap."""
    return {
        plot.name: {
            curve: {axis: [_json_number(value) for value in values] for axis, values in axes.items()}
            for curve, axes in plot.points.items()
        }
        for plot in plots
    }


def _json_number(value: Any) -> Any:
    if not isinstance(value, float | np.floating):
        return value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.6g}") if np.isfinite(value) else None


@contextmanager
def canvas(rows: int = 1, height_inches: float = 2.9, **gridspec: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure of `rows` axes that share x, drawn in the page's style. gridspec: as matplotlib's `GridSpec`."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches))
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw=gridspec or None)
        yield figure, list(axes[:, 0])


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """Return the figure as an <svg> element: the same figure gives the same bytes.

    Args:
        name: prefix of the ids inside, unique on the page.
        description: what a reader who cannot see the plot is told.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A <style> inside would apply to the whole page; the template has the same rule for its plots alone.
    for needless in (r"<metadata>.*?</metadata>", r"<!--.*?-->", r"<style.*?</style>", r"<defs>\s*</defs>"):
        text = re.sub(needless + r"\s*", "", text, flags=re.DOTALL)
    # Ids repeat between figures; a page may hold each only once.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', _opening_tag(description), text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text.strip())


def _opening_tag(description: str) -> str:
    label = str(escape(description)).replace("\\", r"\\")
    return rf'<svg viewBox="\1" role="img" aria-label="{label}">'


class LineStyle(TypedDict):
    """Keywords of matplotlib."""

    color: str
    linestyle: str


def split_styles(splits: Iterable[str]) -> dict[str, LineStyle]:
    """Return colour and dashes for each of the first four splits; test, valid and train look alike in every plot."""
    shown = list(splits)[: len(SERIES)]
    styles = [LineStyle(color=colour, linestyle=dashes) for colour, dashes in zip(SERIES, DASHES, strict=True)]
    chosen = {split: styles[at] for at, split in enumerate(("test", "valid", "train")) if split in shown}
    free = [style for style in styles if style not in chosen.values()]
    chosen.update(zip([split for split in shown if split not in chosen], free, strict=False))
    return {split: chosen[split] for split in shown}


def legend_above(axes: Axes) -> None:
    """Draw a legend that covers nothing: above the axes, in at most two lines; none if nothing has a name."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        style = dict(borderaxespad=0.2, handlelength=1.8, columnspacing=1.2, markerscale=0.7)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=-(-len(names) // (1 + (len(names) > 3))), **style)


def unit_of(highest: float) -> tuple[int, str]:
    """Return bytes and name of the unit for an axis of bytes, so that its marks are round numbers of it."""
    unit = 1024 ** min(3, (max(1, int(highest)).bit_length() - 1) // 10)
    return unit, size(unit).split()[-1]


def short_number(value: float, _: Any = None) -> str:
    """Format 12500 as 12.5k, for axes."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
