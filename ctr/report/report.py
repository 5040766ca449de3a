"""Write report.json and report.html of a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics.exact import group_auc, summarise
from tessera.ctr.metrics.score_table import Rows, score_table
from tessera.ctr.report import about, task_reports
from tessera.ctr.report.calibrated import read_calibrated
from tessera.ctr.report.files import json_text, read_text
from tessera.ctr.report.history import History, read_history
from tessera.ctr.report.page import Page, lead
from tessera.ctr.report.plot import Plot, json_points
from tessera.ctr.report.predictions import PREFERRED_SPLITS, SLICE, read_predictions, slice_names
from tessera.ctr.report.quality import SplitCurves, calibration_plot, pr_plot, prediction_plot, roc_plot, split_curves
from tessera.ctr.report.result import PREDICTIONS, TASKS, settle_result
from tessera.ctr.report.slices import SLICE_NAMES, Slices, measure_slices
from tessera.ctr.report.tables import json_values, table_plots
from tessera.ctr.report.training import training_plots
from tessera.distributed.atomic import write_text


@dataclass(frozen=True)
class Report:
    """A written report. `values` is the content of report.json."""

    folder: Path
    values: dict[str, Any]

    def summary(self) -> str:
        """Return the result and the place of the page, in one line."""
        if "tasks" in self.values:
            sentence = task_reports.lead(self.values)
        else:
            sentence = lead(self.values["split"], self.values, self.values.get("ceiling"))
        return f"{sentence} Report: {self.folder / 'report.html'}"


def write_report(
    run_dir: str | Path,
    teacher: dict[str, Any] | None = None,
    result: Path | None = None,
    scored: Mapping[str, Mapping[str, int]] | None = None,
    task: str = "",
) -> Report:
    """Measure a run's predictions and write report.json and report.html into its folder, each whole or not.

    Reads predictions/*.parquet, and where present metrics.jsonl, config.yaml, plan.txt, versions.json and
    teacher.json. Without predictions, the report of a run that has trained tells of the training alone.

    Args:
        teacher: auc and logloss of the best possible predictions, {"auc": .., "logloss": ..}, or by split,
            {"splits": {"test": {"auc": .., "logloss": ..}}}. None: teacher.json, of the same form.
        result: the folder where the predictions are and the report goes, for a result that is not yet that of the run
            (ctr/report/result.py). None: the run's folder.
        scored: how many rows of positive weight each split must have, by answer ("" of a single label). None: as many
            as there are.
        task: of several labels, the answer that `result` is of; "": the run. Where its predictions lie by answer
            (`predictions.answer_folder`), each has a report in its folder, and the run's tells of all.

    Raises:
        DataError: the predictions or one of the other files cannot be used; one line that names the file.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a run folder with predictions")
    if result is None:
        settle_result(folder)
    result = result or folder
    if not task and (result / TASKS).is_dir():
        values = task_reports.write(folder, result, teacher, scored, write_report)
        return Report(folder, values)
    history = read_history(folder / "metrics.jsonl", task)
    nothing_scored = not (result / PREDICTIONS).exists() and len(history.train.get("step", ()))
    rows_by_split = {} if nothing_scored else read_predictions(result / PREDICTIONS)
    if scored is not None:
        rows = {split: of_split[task] for split, of_split in scored.items()}
        _check_scored(result / PREDICTIONS, rows, rows_by_split)
    names = [name for name in PREFERRED_SPLITS if name in rows_by_split]
    names += [name for name in rows_by_split if name not in names]
    ceilings = ceilings_of(folder / "teacher.json", teacher, [*names, *history.evaluations], task)
    # Rows are let go split by split: only the curves stay.
    measured = [_measure(name, rows_by_split.pop(name)) for name in names]
    ceiling = ceilings.get(names[0]) if names else None
    # The split that training was steered by has the most evaluations; its own ceiling belongs beside it.
    watched = max(history.evaluations, key=lambda split: len(history.evaluations[split]["step"]), default="valid")
    slices = _slices(folder, result / PREDICTIONS, names[0]) if names else []
    calibrated = read_calibrated(result, {one.split: one.metrics for one in measured})
    page = Page(
        title=folder.resolve().name + (f" · {task}" if task else ""),
        subtitle=about.subtitle(folder),
        splits={one.split: one.metrics for one in measured},
        ceiling=ceiling,
        quality_plots=_quality_plots(measured),
        training_plots=training_plots(history, watched, ceilings.get(watched)),
        table_plots=table_plots(history),
        slices=slices,
        history=history,
        texts=about.texts(folder),
        versions=about.versions(folder),
        calibrated=calibrated,
    )
    values = _values(measured, ceiling, history)
    if calibrated:
        values["calibrated"] = calibrated.json()
    if slices:
        values["slices"] = {one.feature: one.json() for one in slices}
    values["plots"] = json_points(page.plots)
    content = {"report.json": json_text(values) + "\n", "report.html": page.html()}
    for name, text in content.items():
        write_text(result / name, text)
    return Report(folder, values)


def _check_scored(folder: Path, scored: dict[str, int], found: dict[str, Rows]) -> None:
    """Raise DataError if the predictions are not the rows that were scored."""
    for split, rows in scored.items():
        there = len(found[split].prediction) if split in found else 0
        if there != rows:
            raise DataError(
                f"{folder}: {there:,} rows of {split}, and {rows:,} were scored; all hosts must share the run's folder"
            )


def _quality_plots(measured: list[SplitCurves]) -> list[Plot]:
    if not measured:
        return []
    plots = [roc_plot(measured), pr_plot(measured), calibration_plot(measured[0]), prediction_plot(measured[0])]
    return [plot for plot in plots if plot is not None]


def _values(measured: list[SplitCurves], ceiling: dict[str, float] | None, history: History) -> dict[str, Any]:
    """Return the content of report.json: the metrics of the first split, and the other values."""
    values: dict[str, Any] = {"split": None}
    if measured:
        values = {"split": measured[0].split, "step": history.scored_step, **measured[0].metrics}
    if len(measured) > 1:
        values["splits"] = {one.split: one.metrics for one in measured}
    if ceiling:
        values["ceiling"] = ceiling
    if history.last_tables:
        values["tables"] = json_values(history.last_tables)
    return values


def _slices(folder: Path, predictions: Path, split: str) -> list[Slices]:
    """Measure the slices by each column, one at a time."""
    names = read_text(folder / SLICE_NAMES)
    names = json.loads(names) if names else {}
    columns = slice_names(predictions)
    return [measure_slices(predictions, split, one, names.get(one.removeprefix(SLICE))) for one in columns]


def _measure(split: str, rows: Rows) -> SplitCurves:
    groups = None if rows.group is None else group_auc(rows)
    table = score_table(rows)
    return split_curves(split, table, summarise(table, groups))


def ceilings_of(
    path: Path, teacher: dict[str, Any] | None, splits: list[str], task: str = ""
) -> dict[str, dict[str, float]]:
    """Return AUC and logloss of the best possible predictions, for each split with known ones; of one of several labels
    under "tasks" in the entry of a split, if it is there."""
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
        if task:
            of_task = {split: entry.get("tasks", {}).get(task) for split, entry in entries.items()}
            entries = {split: entry for split, entry in of_task.items() if entry is not None}
        known = {split: entry for split, entry in entries.items() if entry["auc"] is not None}
        return {split: {name: float(one[name]) for name in ("auc", "logloss")} for split, one in known.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        expected = 'expected numbers "auc" and "logloss", or these for each split under "splits"'
        raise DataError(f"{path}: found {str(teacher)[:80]}; {expected}") from None
