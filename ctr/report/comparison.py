"""Compare two runs on the rows that both scored, and write comparison.json and comparison.html."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics.compare import Difference, PairedRows, auc_difference, logloss_difference, paired_bootstrap
from tessera.ctr.metrics.exact import summarise
from tessera.ctr.metrics.score_table import Rows, score_table
from tessera.ctr.output_folders import replacing
from tessera.ctr.report.comparison_plots import day_plot, replicates_plot
from tessera.ctr.report.definitions import DEFINITIONS, number
from tessera.ctr.report.files import json_text
from tessera.ctr.report.page import Card, render
from tessera.ctr.report.paired import Scored, pooled, read_pairs
from tessera.ctr.report.plot import Plot, Table, json_points
from tessera.ctr.report.quality import SplitCurves, roc_plot, split_curves
from tessera.distributed.atomic import write_text

TITLES = {"auc": "AUC", "logloss": "logloss"}
PLACE = "comparisons"  # in the folder of the second run
CLOSED_FORMS = {"auc": auc_difference, "logloss": logloss_difference}


@dataclass(frozen=True)
class Comparison:
    """A written comparison. `values` is the content of comparison.json."""

    folder: Path
    values: dict[str, Any]

    def summary(self) -> str:
        """Return the differences with their intervals and the place of the page, in one line."""
        return f"{self.values['summary']} Page: {self.folder / 'comparison.html'}"


@dataclass(frozen=True)
class Interval:
    """Interval of one metric's difference: in closed form, and by quantiles of the bootstrap (None: no replicate was
    asked for)."""

    metric: str
    closed: Difference
    low: float | None
    high: float | None
    replicates: np.ndarray

    @property
    def ends(self) -> tuple[float, float]:
        if self.low is None or self.high is None:
            return self.closed.low, self.closed.high
        return self.low, self.high


def compare_runs(
    first: Path,
    second: Path,
    output: Path,
    split: str | None = None,
    replicates: int = 1000,
    confidence: float = 0.95,
    *,
    by_group: bool = False,
    seed: int = 0,
    label: str = "",
) -> Comparison:
    """Write how the second run differs from the first into the folder `output`.

    Args:
        split: None takes test, valid or train, the first that both have. Two folders of daily retraining are compared
            over all days that both scored.
        replicates: of the bootstrap; 0 leaves the closed forms alone.
        label: which of several; of a funnel also click_and_buy.
        by_group: draw groups (schema.group) instead of rows, where rows of a group are alike.

    Raises:
        DataError: the runs were not scored on the same rows; one line that says what differs.
        ConfigError: `output` holds something else than an earlier comparison, or lies in one of the runs.
    """
    for folder in (first, second):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; expected a run folder with predictions")
    parts, remarks = read_pairs(first, second, split, label)
    names = _names(first, second)
    rows = pooled(parts, by_group=by_group)
    curves = [_curves(name, scores, rows) for name, scores in zip(names, (rows.first, rows.second), strict=True)]
    intervals = _intervals(rows, replicates, confidence, seed)
    days = _by_day(parts, confidence) if (first / "days.jsonl").is_file() else []
    what = f"{len(days)} days" if days else parts[0].name
    summary = _summary(names, intervals, len(rows.positive), what, confidence)
    drawn = [replicates_plot(one.metric, TITLES[one.metric], one.replicates, one.ends) for one in intervals]
    plots = [plot for plot in (day_plot(days), *drawn, roc_plot(curves)) if plot is not None]
    values: dict[str, Any] = {
        "summary": summary,
        "first": {"folder": str(first), **curves[0].metrics},
        "second": {"folder": str(second), **curves[1].metrics},
        "differences": {one.metric: _json(one) for one in intervals},
        "settings": {
            "split": None if days else parts[0].name,
            **({"label": label} if label else {}),
            "replicates": replicates,
            "confidence": confidence,
            "resampled": "groups" if by_group else "rows",
            "seed": seed,
        },
    }
    values |= {"days": days, "mean_of_days": _mean_of_days(days, confidence)} if days else {}
    values["plots"] = json_points(plots)
    page = _page(names, what, intervals, curves, plots, days, remarks, values)
    with replacing(output, "--output", "compare.py", (first, second), [second / PLACE]) as folder:
        write_text(folder / "comparison.json", json_text(values) + "\n")
        write_text(folder / "comparison.html", page)
    return Comparison(output, values)


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Return the ends of both paths, just long enough to tell them apart."""
    parts = [folder.resolve().parts for folder in (first, second)]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if names[0] != names[1]:
            return names[0], names[1]
    return f"{names[0]} (first)", f"{names[1]} (second)"


def _curves(name: str, prediction: np.ndarray, rows: PairedRows) -> SplitCurves:
    table = score_table(Rows(prediction, rows.positive, rows.weight, None))
    metrics = summarise(table, None)
    return split_curves(name, table, metrics)


def _intervals(rows: PairedRows, replicates: int, confidence: float, seed: int) -> list[Interval]:
    drawn = paired_bootstrap(rows, replicates, seed)
    tail = (1 - confidence) / 2
    intervals = []
    for metric, closed_form in CLOSED_FORMS.items():
        closed = closed_form(rows, confidence)
        if closed is None:
            continue
        known = drawn[metric][np.isfinite(drawn[metric])]
        low, high = np.quantile(known, [tail, 1 - tail]).tolist() if len(known) else (None, None)
        intervals.append(Interval(metric, closed, low, high, known))
    return intervals


def _by_day(parts: list[Scored], confidence: float) -> list[dict[str, Any]]:
    days = []
    for part in parts:
        found = {metric: closed_form(part.rows, confidence) for metric, closed_form in CLOSED_FORMS.items()}
        known = {metric: _closed_json(one) for metric, one in found.items() if one is not None}
        days.append({"partition": part.name, "rows": len(part.rows.positive), **known})
    return days


def _mean_of_days(days: list[dict[str, Any]], confidence: float) -> dict[str, Any]:
    """Return the mean of the days' differences, each day counting once: the difference in a mean of progressive
    evaluation. Days are taken to be independent."""
    means = {}
    for metric in CLOSED_FORMS:
        known = [day[metric] for day in days if metric in day]
        if known:
            value = sum(one["difference"] for one in known) / len(known)
            error = sum(one["standard_error"] ** 2 for one in known) ** 0.5 / len(known)
            half = NormalDist().inv_cdf(0.5 + confidence / 2) * error
            means[metric] = {"days": len(known), "difference": value, "low": value - half, "high": value + half}
    return means


def _closed_json(one: Difference) -> dict[str, float]:
    return {**asdict(one), "difference": one.value}


def _json(one: Interval) -> dict[str, Any]:
    values: dict[str, Any] = {"difference": one.closed.value, "closed_form": asdict(one.closed)}
    if len(one.replicates):
        error = float(one.replicates.std(ddof=1)) if len(one.replicates) > 1 else None
        share = float(np.mean(one.replicates > 0))
        values["bootstrap"] = {"low": one.low, "high": one.high, "standard_error": error, "share_above_zero": share}
    return values


def _summary(names: tuple[str, str], intervals: list[Interval], rows: int, what: str, confidence: float) -> str:
    parts = [f"{card.title[0].lower()}{card.title[1:]} undefined" for card in _undefined_cards(intervals)]
    for one in intervals:
        low, high = one.ends
        parts.append(
            f"{TITLES[one.metric]} {one.closed.second:.4f} against {one.closed.first:.4f}, {_signed(one.closed.value)} "
            f"({confidence:.0%} interval {_signed(low)} to {_signed(high)})"
        )
    return f"{names[1]} against {names[0]} on {rows:,} rows of {what}: {'; '.join(parts)}."


def _signed(value: float) -> str:
    text = f"{value:+.5f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def _page(
    names: tuple[str, str],
    what: str,
    intervals: list[Interval],
    curves: list[SplitCurves],
    plots: list[Plot],
    days: list[dict[str, Any]],
    remarks: list[str],
    values: dict[str, Any],
) -> str:
    return render(
        "comparison.html",
        title=f"{names[1]} against {names[0]}",
        subtitle=f"The same {curves[0].metrics['rows']:,} rows of {what}, scored by both.",
        lead=" ".join(_verdict(names, one) for one in intervals) or values["summary"],
        remarks=remarks,
        numbers="comparison.json",
        cards=[_card(one, values["settings"]["confidence"]) for one in intervals] + _undefined_cards(intervals),
        plots=plots,
        metrics=_metrics_table(names, curves),
        intervals=_interval_table(intervals),
        days=_day_table(days) if days else None,
        means=[_mean_sentence(*item) for item in values.get("mean_of_days", {}).items()],
        settings=values["settings"],
        definitions=[one for one in DEFINITIONS if one.key in curves[0].metrics],
    )


def _mean_sentence(metric: str, mean: dict[str, float]) -> str:
    ends = f"{_signed(mean['low'])} to {_signed(mean['high'])}"
    return f"Mean difference of {mean['days']} days in {TITLES[metric]}: {_signed(mean['difference'])} ({ends})."


def _verdict(names: tuple[str, str], one: Interval) -> str:
    low, high = one.ends
    title = TITLES[one.metric]
    if low <= 0 <= high:
        return f"The difference in {title}, {_signed(one.closed.value)}, is within what chance explains."
    better = (one.closed.value > 0) == (one.metric == "auc")
    return f"{names[1]} is {'better' if better else 'worse'} in {title} by {_signed(one.closed.value).lstrip('+−')}."


def _card(one: Interval, confidence: float) -> Card:
    low, high = one.ends
    detail = f"{confidence:.0%} interval {_signed(low)} to {_signed(high)}"
    ideal = "Above 0" if one.metric == "auc" else "Below 0"
    meaning = f"Second run minus first. {ideal} the second is better; an interval with 0 in it leaves it open."
    return Card(one.metric, f"Difference in {TITLES[one.metric]}", "", meaning, _signed(one.closed.value), detail)


def _undefined_cards(intervals: list[Interval]) -> list[Card]:
    """Return a card for each metric whose difference is undefined on these rows."""
    missing = [metric for metric in CLOSED_FORMS if metric not in [one.metric for one in intervals]]
    why = {one.key: one.undefined for one in DEFINITIONS}
    return [Card(metric, f"Difference in {TITLES[metric]}", "", "", None, why[metric]) for metric in missing]


def _metrics_table(names: tuple[str, str], curves: list[SplitCurves]) -> Table:
    rows = []
    for one in DEFINITIONS:
        values = [curve.metrics[one.key] for curve in curves]
        if one.key == "gauc":
            continue
        known = all(value is not None for value in values)
        difference = _signed(values[1] - values[0]) if known else "–"
        rows.append([one.title, *map(number, values), difference])
    return Table(["metric", *names, "difference"], rows)


def _interval_table(intervals: list[Interval]) -> Table:
    rows = []
    for one in intervals:
        closed, title = one.closed, TITLES[one.metric].capitalize() if one.metric != "auc" else "AUC"
        form = "DeLong" if one.metric == "auc" else "paired differences"
        ends = f"{_signed(closed.low)} to {_signed(closed.high)}"
        p_value = f"{closed.p_value:.3g}" if closed.p_value >= 1e-4 else "< 0.0001"
        rows.append([f"{title}, {form}", _signed(closed.value), ends, f"{closed.standard_error:.5f}", p_value])
        if one.low is not None and one.high is not None:
            drawn = one.replicates
            ends = f"{_signed(one.low)} to {_signed(one.high)}"
            rows.append([f"{title}, bootstrap", _signed(closed.value), ends, f"{drawn.std():.5f}", "–"])
    return Table(["method", "difference", "interval", "standard error", "p-value"], rows)


def _day_table(days: list[dict[str, Any]]) -> Table:
    rows = []
    for day in reversed(days):
        cells = [f"{day['rows']:,}"]
        for metric in CLOSED_FORMS:
            one = day.get(metric)
            values = [f"{one['first']:.4f}", f"{one['second']:.4f}", _signed(one["difference"])] if one else []
            cells += values or ["undefined"] * 3
            if metric == "auc":
                cells.append(f"{_signed(one['low'])} to {_signed(one['high'])}" if one else "undefined")
        rows.append([day["partition"], *cells])
    head = ["AUC, first", "AUC, second", "difference", "interval", "logloss, first", "logloss, second", "difference"]
    return Table(["day", "rows", *head], rows)
