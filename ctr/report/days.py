"""Write index.html and index.json of a folder of daily retraining: its days in one view, from days.jsonl.

The days' own pages (`report.py`) get a way to the index and to their neighbours from here, because only here is it
known which day comes next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from tessera.ctr.data.errors import DataError
from tessera.ctr.report import about
from tessera.ctr.report.day_plots import operation_plots, quality_plots
from tessera.ctr.report.definitions import DEFINITIONS, number, percent
from tessera.ctr.report.files import json_text
from tessera.ctr.report.page import Card, render, versions_table
from tessera.ctr.report.plot import Table, json_points
from tessera.distributed.atomic import write_text
from tessera.distributed.plan import size

STATUSES = ("trained", "held", "skipped")
# A day is compared with the mean of so many trained days before it.
WINDOW = 7
# Marks in template run.html between which a day's page has its links.
BEGIN, END = "<!--days-->", "<!--/days-->"
CARDS = ("auc", "logloss", "normalized_entropy", "calibration")


@dataclass(frozen=True)
class Index:
    """A written index. `values` is the content of index.json."""

    folder: Path
    values: dict[str, Any]

    def summary(self) -> str:
        """Return the outcome of all days and the quality of the last one, in one line."""
        return f"{self.values['summary']} Index: {self.folder / 'index.html'}"


def write_index(run_dir: str | Path) -> Index:
    """Write index.json and index.html over the days of days.jsonl, and the links of the days' pages.

    Raises:
        DataError: no days.jsonl, or a line that is not a day; names the file and the line.
    """
    folder = Path(run_dir)
    days = read_days(folder / "days.jsonl")
    quality, operation = quality_plots(days), operation_plots(days)
    values = {"summary": lead(days), "days": days, "plots": json_points([*quality, *operation])}
    linked = {day["partition"] for day in days if _page(folder, day).is_file()}
    html = render(
        "days.html",
        title=folder.resolve().name,
        subtitle=_subtitle(folder, days),
        lead=values["summary"],
        remarks=[],
        numbers="index.json",
        set_aside=[day for day in reversed(days) if day["status"] != "trained"],
        cards=_cards(days),
        last=next((day["partition"] for day in reversed(days) if day.get("logloss") is not None), None),
        quality_plots=quality,
        operation_plots=operation,
        quality=_quality_table(days, linked),
        operation=_operation_table(days, linked),
        definitions=DEFINITIONS,
        texts=about.texts(folder),
        versions=versions_table(about.versions(folder)),
    )
    write_text(folder / "index.json", json_text(values) + "\n")
    write_text(folder / "index.html", html)
    _link_pages(folder, [day for day in days if day["partition"] in linked])
    return Index(folder, values)


def read_days(path: Path) -> list[dict[str, Any]]:
    """Return the days in the order of the file; if a partition stands twice the later line counts, in the first place.

    Raises:
        DataError: no such file, no day in it, or a line that is not an object with a partition and a status. A last
            line without its end (a crash) is passed over.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a folder of daily retraining, with a line for each day")
    days: dict[str, dict[str, Any]] = {}
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for at, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            day = json.loads(text)
        except json.JSONDecodeError:
            day = None
        if not isinstance(day, dict) or not isinstance(day.get("partition"), str) or day.get("status") not in STATUSES:
            expected = f'a JSON object with "partition" and a "status" of {", ".join(STATUSES)}'
            raise DataError(f"{path}: line {at} is {text[:60]!r}; expected {expected}")
        days[day["partition"]] = day
    if not days:
        raise DataError(f"{path}: no day in this file; expected at least one")
    return list(days.values())


def lead(days: list[dict[str, Any]]) -> str:
    """Return the number of days by outcome, and the quality on the last one, in a sentence or two."""
    counts = [(status, sum(day["status"] == status for day in days)) for status in STATUSES]
    counted = ", ".join(f"{count} {status}" for status, count in counts if count)
    measured = [day for day in days if day.get("logloss") is not None]
    sentence = f"{_plural(len(days), 'day')}: {counted}."
    if not measured:
        return sentence
    last = measured[-1]
    quality = f"AUC {number(last.get('auc'))} and logloss {number(last['logloss'])}"
    return f"{sentence} {quality} on {last['rows']:,} rows of {last['partition']}, before it was trained on."


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _subtitle(folder: Path, days: list[dict[str, Any]]) -> str:
    span = f"{days[0]['partition']} to {days[-1]['partition']}" if len(days) > 1 else days[0]["partition"]
    return " · ".join(filter(None, [about.subtitle(folder), span]))


def _cards(days: list[dict[str, Any]]) -> list[Card]:
    """Return cards of the last measured day, each number beside its mean over the trained days before."""
    measured = [day for day in days if day.get("logloss") is not None]
    if not measured:
        return []
    last = measured[-1]
    # The first day was scored by a model that had learnt nothing.
    before = [day for day in measured[:-1] if day["status"] == "trained" and day is not days[0]][-WINDOW:]
    cards = []
    for one in DEFINITIONS:
        if one.key not in CARDS:
            continue
        value, others = last.get(one.key), [day[one.key] for day in before if day.get(one.key) is not None]
        detail = ""
        if value is None:
            detail = one.undefined
        elif others:
            mean = sum(others) / len(others)
            detail = f"mean of the {_plural(len(others), 'day')} before: {mean:.4f} ({_signed(value - mean)})"
        cards.append(Card.of(one, None if value is None else number(value), detail))
    return cards + _operation_cards(last)


def _operation_cards(last: dict[str, Any]) -> list[Card]:
    cards, tables = [], last.get("tables") or {}
    if tables.get("rows") is not None:
        came, went = (_count(tables.get(key)) for key in ("new", "expired"))
        moved = f"{_size(tables.get('bytes'))}; {came} new ids, {went} expired"
        meaning = "Ids that have a row of an embedding table after the day."
        cards.append(Card("table-rows", "Rows of tables", "", meaning, _count(tables["rows"]), moved))
    parts = {"evaluation": last.get("evaluate_seconds"), "training": last.get("train_seconds")}
    known = {name: seconds for name, seconds in parts.items() if seconds is not None}
    if known:
        detail = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in known.items())
        meaning = "Time that the day took, without what it waited for its data."
        cards.append(Card("time", "Time", "", meaning, _duration(sum(known.values())), detail))
    return cards


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _quality_table(days: list[dict[str, Any]], linked: set[str]) -> Table:
    head = ["day", "status", "rows", "observed rate", "AUC", "logloss", "normalized entropy", "calibration", "GAUC"]
    rows = []
    for day in reversed(days):
        keys = ("auc", "logloss", "normalized_entropy", "calibration", "gauc")
        cells = [_status(day), _count(day.get("rows")), _measured(day, "observed_rate", percent)]
        cells += [_measured(day, key, number) for key in keys]
        parts = [day.get(part) or {} for part in ("known", "new")]
        new = parts[1].get("rows")
        cells += [_measured(part, "auc", number) for part in parts]
        cells += ["–" if new is None or not day.get("rows") else f"{new / day['rows']:.1%}"]
        rows.append([_name(day, linked), *cells])
    return Table([*head, "AUC, known ids", "AUC, new ids", "rows with new ids"], rows)


def _operation_table(days: list[dict[str, Any]], linked: set[str]) -> Table:
    head = ["day", "step", "table rows", "bytes", "new ids", "expired", "published", "size", "samples/s"]
    rows = []
    for day in reversed(days):
        tables = day.get("tables") or {}
        cells = [_count(day.get("step")), _count(tables.get("rows")), _size(tables.get("bytes"))]
        cells += [_count(tables.get("new")), _count(tables.get("expired"))]
        cells += [day.get("published") or "–", _size(day.get("published_bytes")), _count(day.get("samples_per_second"))]
        cells += [_duration(day.get("evaluate_seconds")), _duration(day.get("train_seconds"))]
        rows.append([_name(day, linked), *cells])
    return Table([*head, "evaluation", "training"], rows)


def _name(day: dict[str, Any], linked: set[str]) -> str:
    name = day["partition"]
    return Markup('<a href="days/{}/report.html">{}</a>').format(quote(name), name) if name in linked else name


def _status(day: dict[str, Any]) -> str:
    status = day["status"]
    return status if status == "trained" else Markup('<strong class="{0}">{0}</strong>').format(status)


def _measured(part: dict[str, Any], key: str, shown: Callable[[float | None], str]) -> str:
    """Return a metric of scored rows as text: "undefined" if they give none, a dash if nothing was scored or told."""
    if part.get("rows") is None or key not in part:
        return "–"
    return shown(part[key])


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _size(value: float | None) -> str:
    return "–" if value is None else size(value)


def _page(folder: Path, day: dict[str, Any]) -> Path:
    return folder / "days" / day["partition"] / "report.html"


def _link_pages(folder: Path, days: list[dict[str, Any]]) -> None:
    """Put into each page what it says of its day and its neighbours; pages that say so already are left alone."""
    for at, day in enumerate(days):
        before = days[at - 1]["partition"] if at else None
        after = days[at + 1]["partition"] if at + 1 < len(days) else None
        wanted = f"{BEGIN}{_navigation(day, before, after)}{END}"
        path = _page(folder, day)
        with open(path, encoding="utf-8") as file:
            text = file.read(1 << 14)  # the place is behind the style sheet, near the top
            if wanted in text:
                continue
            text += file.read()
        head, begin, rest = text.partition(BEGIN)
        _, end, tail = rest.partition(END)
        if begin and end:
            write_text(path, head + wanted + tail)


def _navigation(day: dict[str, Any], before: str | None, after: str | None) -> Markup:
    links = [Markup('<a href="../../index.html">All days</a>')]
    for name, relation, shown in ((before, "prev", "← {}"), (after, "next", "{} →")):
        if name:
            link = Markup('<a rel="{}" href="../{}/report.html">{}</a>')
            links.append(link.format(relation, quote(name), shown.format(name)))
    tables = day.get("tables") or {}
    facts = [f"{day['partition']}: {day['status']}"]
    facts += [day["reason"]] if day.get("reason") else []
    if day.get("published"):
        facts.append(f"published as {day['published']}, {_size(day.get('published_bytes'))}")
    if tables.get("rows") is not None:
        counts = [_count(tables.get(key)) for key in ("new", "expired", "rows")]
        facts.append("{} new ids, {} expired, {} rows of tables".format(*counts))
    if day.get("train_seconds") is not None:
        facts.append(f"trained in {_duration(day['train_seconds'])}")
    line = Markup('\n<nav class="days" aria-label="Days">{}</nav>\n<p class="soft">{}.</p>\n')
    return line.format(Markup(" ").join(links), " · ".join(facts))
