"""Render the HTML page of a report, from numbers and plots that are ready."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from tessera.ctr.report.about import Text
from tessera.ctr.report.calibrated import Calibrated
from tessera.ctr.report.definitions import DEFINITIONS, Definition, number
from tessera.ctr.report.history import History
from tessera.ctr.report.plot import Plot, Table
from tessera.ctr.report.slices import Slices
from tessera.ctr.report.tables import numbers_by_table
from tessera.ctr.report.training import course


@dataclass(frozen=True)
class Card:
    """One number. `value` is None where it is undefined; `detail` then says why. `key` is unique on the page."""

    key: str
    title: str
    formula: str
    meaning: str
    value: str | None
    detail: str

    @staticmethod
    def of(definition: Definition, value: str | None, detail: str) -> Card:
        ideal = definition.ideal and f" {definition.ideal[0].upper()}{definition.ideal[1:]}."
        return Card(definition.key, definition.title, definition.formula, definition.meaning + ideal, value, detail)


@dataclass(frozen=True)
class Page:
    """All that the template shows. `splits`: metrics of each split, the first is the one of the cards; none where
    nothing was scored. `tasks`: of several labels, and `said` the result in one sentence."""

    title: str
    subtitle: str
    splits: dict[str, dict[str, Any]]
    ceiling: dict[str, float] | None
    quality_plots: list[Plot]
    training_plots: list[Plot]
    table_plots: list[Plot]
    slices: list[Slices]
    history: History
    texts: list[Text]
    versions: dict[str, str]
    tasks: Table | None = None
    said: str | None = None
    calibrated: Calibrated | None = None

    @property
    def plots(self) -> list[Plot]:
        return [*self.quality_plots, *self.training_plots, *self.table_plots]

    def html(self) -> str:
        split, metrics = next(iter(self.splits.items()), (None, {}))
        tables = self.history.last_tables
        return render(
            "run.html",
            title=self.title,
            subtitle=self.subtitle,
            lead=self.said or lead(split, metrics | {"step": self.history.scored_step}, self.ceiling),
            tasks=self.tasks,
            remarks=course(self.history) + _left_out(self.history),
            numbers="report.json",
            split=split,
            cards=[_card(definition, metrics, self.ceiling) for definition in DEFINITIONS] if split else [],
            comparison=_comparison(self.splits) if len(self.splits) > 1 else None,
            calibrated=self.calibrated,
            quality_plots=self.quality_plots,
            training_plots=self.training_plots,
            table_plots=self.table_plots,
            slices=self.slices,
            last_tables=tables,
            by_table=numbers_by_table(tables) if tables else None,
            definitions=DEFINITIONS,
            texts=self.texts,
            versions=versions_table(self.versions),
        )


def render(template: str, **values: Any) -> str:
    """Render a template of this folder, which all extend base.html, with its values."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> jinja2.Environment:
    """Return what keeps templates compiled: a run over days writes its pages anew every day."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def versions_table(versions: dict[str, str]) -> Table | None:
    return Table(["package", "version"], [list(item) for item in versions.items()]) if versions else None


def lead(split: str | None, metrics: dict[str, Any], ceiling: dict[str, float] | None) -> str:
    """Return the result in one sentence. `metrics` may say of which step's model it is."""
    if split is None:
        return "Nothing was scored; this is the report of the training."
    parts = []
    for name, title in (("auc", "AUC"), ("logloss", "logloss")):
        best = f" (best possible {ceiling[name]:.4f})" if ceiling else ""
        parts.append(f"{title} undefined" if metrics[name] is None else f"{title} {metrics[name]:.4f}{best}")
    model = "" if metrics.get("step") is None else f", by the model of step {metrics['step']:,}"
    return f"{parts[0]} and {parts[1]} on {metrics['rows']:,} rows of {split}{model}."


def _card(definition: Definition, metrics: dict[str, Any], ceiling: dict[str, float] | None) -> Card:
    key, value = definition.key, metrics[definition.key]
    if value is None:
        return Card.of(definition, None, metrics["undefined"][key])
    detail = ""
    if ceiling and key in ceiling:
        detail = f"best possible {ceiling[key]:.4f} ({value - ceiling[key]:+.4f})".replace("-", "−")
    elif key == "gauc":
        detail = f"{metrics['groups']['scored']:,} of {metrics['groups']['total']:,} groups have both classes"
    return Card.of(definition, number(value), detail)


def _comparison(splits: dict[str, dict[str, Any]]) -> Table:
    """Return a table with a row for each metric: few splits and many metrics fit a phone that way round."""
    rows = [[one.title, *(number(metrics[one.key]) for metrics in splits.values())] for one in DEFINITIONS]
    return Table(["metric", *splits], rows)


def _left_out(history: History) -> list[str]:
    """Return a sentence for each split from which the reader left out rows."""
    sentences = []
    for split, counts in sorted(history.left_out.items()):
        reasons = [f"{count:,} rows ({reason})" for reason, count in sorted(counts.items())]
        if reasons:
            sentences.append(f"{split}: left out {', '.join(reasons)}.")
    return sentences
