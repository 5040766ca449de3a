"""Write the page of a search over settings, and the same numbers as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tessera.ctr.report.files import json_text
from tessera.ctr.report.page import render
from tessera.ctr.report.plot import INK, SERIES, Plot, Table, canvas, inline_svg, legend_above
from tessera.ctr.report.trial_result import TrialResult
from tessera.distributed.atomic import write_text

PAGE, NUMBERS, LINE = "report.html", "report.json", "best.txt"


def write_tune_report(
    folder: Path,
    metric: str,
    trials: Sequence[TrialResult],
    best: TrialResult | None,
    line: str | None,
    importance: Mapping[str, float] | None,
    wanted: int,
) -> None:
    """Write report.html, report.json and, with a best trial, best.txt: its overrides as one line for a shell.

    importance: share of each key, None where unknown. wanted: trials that the search is to have.
    """
    told: dict[str, Any] = {
        "metric": metric,
        "wanted": wanted,
        "best": None if best is None else best.number,
        "line": line,
        "importance": None if importance is None else dict(importance),
        "trials": [_json(one) for one in trials],
    }
    write_text(folder / NUMBERS, json_text(told) + "\n")
    write_text(folder / PAGE, page(folder.name, metric, trials, best, line, importance, wanted))
    if line is not None:
        write_text(folder / LINE, line + "\n")


def page(
    title: str,
    metric: str,
    trials: Sequence[TrialResult],
    best: TrialResult | None,
    line: str | None,
    importance: Mapping[str, float] | None,
    wanted: int,
) -> str:
    """Return the page; the arguments are those of `write_tune_report`."""
    counts = {state: sum(one.state == state for one in trials) for state in ("complete", "pruned", "failed")}
    parts = [f"{count} {state}" for state, count in counts.items() if count]
    remarks = [f"{len(trials)} of {wanted} trials: {', '.join(parts)}."] if trials else []
    if importance is None:
        remarks.append("The importance of settings is not known yet: too few trials ran to their end, or none differ.")
    plots = [_course(metric, trials, best), _importance(importance)]
    return render(
        "tune.html",
        title=title,
        subtitle="search over settings",
        lead=_lead(metric, trials, best),
        remarks=remarks,
        numbers=NUMBERS,
        line=line,
        settings=_settings(trials, best),
        plots=[plot for plot in plots if plot is not None],
        trials=_trials(metric, trials, best),
    )


def _lead(metric: str, trials: Sequence[TrialResult], best: TrialResult | None) -> str:
    if best is None or best.value is None:
        return "No trial ran to its end yet."
    first = next((one for one in trials if one.number == 0), None)
    given = "" if first is None or first.value is None else f"; trial 0, with the settings as given, {first.value:.5f}"
    return f"{metric} {best.value:.5f} on the valid split, by trial {best.number}{given}."


def _settings(trials: Sequence[TrialResult], best: TrialResult | None) -> Table | None:
    if best is None:
        return None
    first = next((one.values for one in trials if one.number == 0), {})
    return Table(
        ["setting", "best", "trial 0"],
        [[key, shown(value), shown(first[key]) if key in first else ""] for key, value in best.values.items()],
    )


def _trials(metric: str, trials: Sequence[TrialResult], best: TrialResult | None) -> Table:
    """Return all trials: those that ran to their end from the best on, then the others in their order."""
    keys = list(dict.fromkeys(key for one in trials for key in one.values))
    sign = -1.0 if best is None or _is_highest(trials, best) else 1.0
    ordered = sorted(trials, key=lambda one: (one.state != "complete", _rank(one, sign), one.number))
    rows = []
    for one in ordered:
        value = "" if one.value is None else f"{one.value:.5f}"
        seconds = "" if one.seconds is None else f"{one.seconds:,.0f}"
        state = f"{one.state}: {one.why}" if one.why else one.state
        settings = [shown(one.values[key]) if key in one.values else "" for key in keys]
        rows.append([str(one.number), state, value, str(len(one.evaluations)), seconds, *settings])
    return Table(["trial", "state", f"best {metric}", "evaluations", "seconds", *keys], rows)


def _rank(one: TrialResult, sign: float) -> float:
    return math.inf if one.value is None or one.state != "complete" else sign * one.value


def _is_highest(trials: Sequence[TrialResult], best: TrialResult) -> bool:
    values = [one.value for one in trials if one.state == "complete" and one.value is not None]
    return best.value == max(values)


def _course(metric: str, trials: Sequence[TrialResult], best: TrialResult | None) -> Plot | None:
    """Plot the value of each trial, and the best so far."""
    shown_trials = [(one.number, one.value, one.state) for one in trials if one.value is not None]
    if not shown_trials or best is None:
        return None
    choose = max if _is_highest(trials, best) else min
    whole = [(number, value) for number, value, state in shown_trials if state == "complete"]
    so_far = [choose(value for _, value in whole[: at + 1]) for at in range(len(whole))]
    with canvas() as (figure, [axes]):
        axes.step([number for number, _ in whole], so_far, where="post", color=INK, linewidth=1, label="best so far")
        for state, colour, marker in (("complete", SERIES[0], "o"), ("pruned", SERIES[1], "x")):
            points = [(number, value) for number, value, one in shown_trials if one == state]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle="none", label=state)
        axes.set(xlabel="trial", ylabel=metric)
        legend_above(axes)
        svg = inline_svg(figure, "course", f"{metric} of {len(shown_trials)} trials; the best is {best.value:.5f}.")
    table = Table(["trial", metric, "state"], [[str(n), f"{v:.5f}", state] for n, v, state in shown_trials])
    points_of: dict[str, np.ndarray | list] = {
        "trial": [number for number, _, _ in shown_trials],
        metric: [value for _, value, _ in shown_trials],
    }
    caption = "Best evaluation of each trial on the valid split; pruned trials ended early."
    return Plot("course", "Trials", caption, svg, table, {"trials": points_of})


def _importance(importance: Mapping[str, float] | None) -> Plot | None:
    if not importance:
        return None
    ordered = sorted(importance.items(), key=lambda item: -item[1])
    places = np.arange(len(ordered))[::-1]
    with canvas(height_inches=0.8 + 0.22 * len(ordered)) as (figure, [axes]):
        axes.barh(places, [share for _, share in ordered], color=SERIES[0], height=0.7)
        axes.set_yticks(places, [key if len(key) <= 26 else f"…{key[-25:]}" for key, _ in ordered])
        axes.grid(visible=False, axis="y")
        said = f"Importance of settings: {ordered[0][0]} has the most, {ordered[0][1]:.0%}."
        svg = inline_svg(figure, "importance", said)
    table = Table(["setting", "importance"], [[key, f"{share:.1%}"] for key, share in ordered])
    points: dict[str, np.ndarray | list] = {
        "setting": [key for key, _ in ordered],
        "share": [share for _, share in ordered],
    }
    caption = (
        "How much a setting tells the best quarter of the trials from all (PED-ANOVA, Watanabe 2023), as shares of 1. "
        "Few trials say little."
    )
    return Plot("importance", "Importance of settings", caption, svg, table, {"importance": points})


def _json(one: TrialResult) -> dict[str, Any]:
    return {key: value for key, value in asdict(one).items() if key != "why" or value}


def shown(value: Any) -> str:
    """Return a setting as the page has it: four digits of a number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
