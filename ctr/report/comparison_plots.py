"""Draw the plots of a comparison: the bootstrap's differences, and the difference of each day."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from tessera.ctr.report.day_plots import finish_days
from tessera.ctr.report.plot import INK, SERIES, Plot, Table, canvas, inline_svg, legend_above
from tessera.ctr.report.steps import evenly

BINS = 40


def replicates_plot(metric: str, title: str, differences: np.ndarray, ends: tuple[float, float]) -> Plot | None:
    """Plot the distribution of the difference over the replicates, with its interval; None without replicates."""
    if not len(differences):
        return None
    counts, edges = np.histogram(differences, BINS if np.ptp(differences) else 1)
    with canvas(height_inches=2.7) as (figure, [axes]):
        axes.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.5)
        axes.axvspan(*ends, color=SERIES[0], alpha=0.12, linewidth=0, label="interval")
        axes.axvline(0, color=INK, linewidth=1, linestyle=":", label="no difference")
        axes.set(xlabel=f"difference in {title}", ylabel="replicates")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        legend_above(axes)
    low, high = ends
    description = f"Histogram of {len(differences):,} differences in {title}; the interval is {low:.5f} to {high:.5f}."
    quantiles = [0.005, 0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975, 0.995]
    rows = [
        [f"{q:.1%}", f"{value:.5f}"] for q, value in zip(quantiles, np.quantile(differences, quantiles), strict=True)
    ]
    return Plot(
        f"replicates-{metric}",
        f"Bootstrap of {title}",
        f"Difference of second and first run on {len(differences):,} resamplings of the rows.",
        inline_svg(figure, f"replicates-{metric}", description),
        Table(["quantile", "difference"], rows),
        {"replicates": {"edges": edges, "count": counts}},
    )


def day_plot(days: list[dict[str, Any]]) -> Plot | None:
    """Plot the difference in AUC on each day with its interval; None without days."""
    known = [(at, day["auc"]) for at, day in enumerate(days) if "auc" in day]
    if not known:
        return None
    places = np.array([at for at, _ in known])
    value, low, high = (np.array([one[key] for _, one in known]) for key in ("difference", "low", "high"))
    with canvas() as (figure, [axes]):
        axes.axhline(0, color=INK, linewidth=1, linestyle=":", label="no difference")
        error = np.stack([value - low, high - value])
        axes.errorbar(places, value, yerr=error, color=SERIES[0], marker="o", linestyle="none", label="second − first")
        finish_days(axes, days, "difference in AUC")
    names = [days[at]["partition"] for at in places]
    above, below = int((low > 0).sum()), int((high < 0).sum())
    ends = f"{above} days clearly above 0, {below} clearly below, {len(names) - above - below} open"
    rows = [[names[at], f"{value[at]:.5f}", f"{low[at]:.5f} – {high[at]:.5f}"] for at in evenly(len(names))]
    return Plot(
        "difference-by-day",
        "Difference in AUC by day",
        "Second run minus first, with DeLong's interval of each day.",
        inline_svg(figure, "difference-by-day", f"Difference in AUC over {len(names)} days: {ends}."),
        Table(["day", "difference", "interval"], rows),
        {"difference": {"day": names, "difference": value, "low": low, "high": high}},
    )
