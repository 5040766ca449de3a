"""Write report.json and report.html of a run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctr.data.errors import DataError
from ctr.metrics.exact import group_auc, summarise
from ctr.metrics.score_table import Rows, score_table
from ctr.report import about
from ctr.report.files import json_text, read_text, write_text
from ctr.report.history import History, read_history
from ctr.report.page import Page, lead
from ctr.report.plot import json_points
from ctr.report.predictions import PREFERRED_SPLITS, SLICE, read_predictions, slice_names
from ctr.report.quality import SplitCurves, calibration_plot, pr_plot, prediction_plot, roc_plot, split_curves
from ctr.report.slices import SLICE_NAMES, Slices, measure_slices
from ctr.report.tables import json_values, table_plots
from ctr.report.training import training_plots


@dataclass(frozen=True)
class Report:
    """A written report. `values` is the content of report.json."""

    folder: Path
    values: dict[str, Any]

    def summary(self) -> str:
        """The result and where the page is, in one line."""
        sentence = lead(self.values["split"], self.values, self.values.get("ceiling"))
        return f"{sentence} Report: {self.folder / 'report.html'}"


def write_report(run_dir: str | Path, teacher: dict[str, Any] | None = None) -> Report:
    """Measure a run's predictions and write report.json and report.html into its folder, each whole or not.

    Reads predictions/*.parquet, and where present metrics.jsonl, config.yaml, plan.txt, versions.json and
    teacher.json.

    Args:
        teacher: auc and logloss of the best possible predictions, {"auc": .., "logloss": ..}, or by split,
            {"splits": {"test": {"auc": .., "logloss": ..}}}. None: teacher.json, of the same form.

    Raises:
        DataError: the predictions or one of the other files cannot be used; one line that names the file.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a run folder with predictions")
    rows_by_split = read_predictions(folder / "predictions")
    history = read_history(folder / "metrics.jsonl")
    names = [name for name in PREFERRED_SPLITS if name in rows_by_split]
    names += [name for name in rows_by_split if name not in names]
    ceilings = _ceilings(folder / "teacher.json", teacher, [*names, *history.evaluations])
    # Rows are let go split by split: only the curves stay.
    measured = [_measure(name, rows_by_split.pop(name)) for name in names]
    first, ceiling = measured[0], ceilings.get(names[0])
    # The split that training was steered by has the most evaluations; its own ceiling belongs beside it.
    watched = max(history.evaluations, key=lambda split: len(history.evaluations[split]["step"]), default=names[0])
    plots = [roc_plot(measured), pr_plot(measured), calibration_plot(first), prediction_plot(first)]
    slices = _slices(folder, first.split)
    page = Page(
        title=folder.resolve().name,
        subtitle=about.subtitle(folder),
        splits={one.split: one.metrics for one in measured},
        ceiling=ceiling,
        quality_plots=[plot for plot in plots if plot is not None],
        training_plots=training_plots(history, watched, ceilings.get(watched)),
        table_plots=table_plots(history),
        slices=slices,
        history=history,
        texts=about.texts(folder),
        versions=about.versions(folder),
    )
    values = _values(measured, ceiling, history)
    if slices:
        values["slices"] = {one.feature: one.json() for one in slices}
    values["plots"] = json_points(page.plots)
    content = {"report.json": json_text(values) + "\n", "report.html": page.html()}
    for name, text in content.items():
        write_text(folder / name, text)
    return Report(folder, values)


def _values(measured: list[SplitCurves], ceiling: dict[str, float] | None, history: History) -> dict[str, Any]:
    """The content of report.json: the metrics of the first split, and what else there is."""
    values = {"split": measured[0].split, **measured[0].metrics}
    if len(measured) > 1:
        values["splits"] = {one.split: one.metrics for one in measured}
    if ceiling:
        values["ceiling"] = ceiling
    if history.last_tables:
        values["tables"] = json_values(history.last_tables)
    return values


def _slices(folder: Path, split: str) -> list[Slices]:
    """By each column of slices, one at a time."""
    names = read_text(folder / SLICE_NAMES)
    names = json.loads(names) if names else {}
    columns = slice_names(folder / "predictions")
    return [measure_slices(folder / "predictions", split, one, names.get(one.removeprefix(SLICE))) for one in columns]


def _measure(split: str, rows: Rows) -> SplitCurves:
    groups = None if rows.group is None else group_auc(rows)
    table = score_table(rows)
    return split_curves(split, table, summarise(table, groups))


def _ceilings(path: Path, teacher: dict[str, Any] | None, splits: list[str]) -> dict[str, dict[str, float]]:
    """AUC and logloss of the best possible predictions, for each split of which they are known."""
    if teacher is None:
        text = read_text(path)
        if not text:
            return {}
        try:
            teacher = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: not JSON: {error}") from None
    try:
        entries = teacher["splits"] if "splits" in teacher else dict.fromkeys(splits, teacher)
        known = {split: entry for split, entry in entries.items() if entry["auc"] is not None}
        return {split: {name: float(one[name]) for name in ("auc", "logloss")} for split, one in known.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        expected = 'expected numbers "auc" and "logloss", or these for each split under "splits"'
        raise DataError(f"{path}: found {str(teacher)[:80]}; {expected}") from None
