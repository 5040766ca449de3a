"""The report of a run with several labels: a report of each in a folder of its own, and a page that leads to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup

from tessera.ctr.data.errors import DataError
from tessera.ctr.report import about
from tessera.ctr.report.definitions import DEFINITIONS, number
from tessera.ctr.report.files import json_text
from tessera.ctr.report.history import read_history
from tessera.ctr.report.page import Page
from tessera.ctr.report.plot import Table, json_points
from tessera.ctr.report.predictions import ANSWER, PLACE, PREFERRED_SPLITS
from tessera.ctr.report.result import PREDICTIONS, TASKS
from tessera.ctr.report.tables import json_values, table_plots
from tessera.ctr.report.training import training_plots
from tessera.distributed.atomic import write_text

MEANS = ("auc", "logloss")


def write(
    folder: Path,
    result: Path,
    teacher: dict[str, Any] | None,
    scored: Mapping[str, Mapping[str, int]] | None,
    write_report: Callable[..., Any],
) -> dict[str, Any]:
    """Write the reports of all answers and that of the run into `result`; return the content of its report.json.

    write_report: that of one answer, as `report.write_report`; the other arguments are as there.
    """
    kinds = kinds_of(result / TASKS)
    found: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        place = result / TASKS / name
        found[name] = (
            measure_numbers(place / PREDICTIONS)
            if kind == "number"
            else metrics_by_split(write_report(folder, teacher, place, scored, name).values)
        )
    history = read_history(folder / "metrics.jsonl")
    split = next(
        name for name in (*PREFERRED_SPLITS, *next(iter(found.values()))) if name in next(iter(found.values()))
    )
    tasks = {name: one.get(split, {}) for name, one in found.items()}
    labels = [one for name, one in tasks.items() if kinds[name] == "label"]
    values: dict[str, Any] = {"split": split, "step": history.scored_step}
    values |= {metric: _mean([one.get(metric) for one in labels]) for metric in MEANS}
    values["tasks"] = tasks
    if any(len(one) > 1 for one in found.values()):
        names = sorted({split for one in found.values() for split in one})
        values["splits"] = {name: {task: one[name] for task, one in found.items() if name in one} for name in names}
    if history.last_tables:
        values["tables"] = json_values(history.last_tables)
    page = _page(folder, values, kinds)
    values["plots"] = json_points(page.plots)
    write_text(result / "report.json", json_text(values) + "\n")
    write_text(result / "report.html", page.html())
    return values


def lead(values: Mapping[str, Any]) -> str:
    """Return the result in one sentence."""
    parts = []
    for name, one in values["tasks"].items():
        key, title = ("mse", "MSE") if "mse" in one else ("auc", "AUC")
        parts.append(f"{name} {title} {number(one.get(key))}")
    step = "" if values["step"] is None else f", by the model of step {values['step']:,}"
    return f"On {values['split']}: {', '.join(parts)}{step}."


def metrics_by_split(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each split in the content of a report.json, the main split first."""
    keys = [definition.key for definition in DEFINITIONS]
    main = {values["split"]: {key: values[key] for key in keys}}
    if "ceiling" in values:
        main[values["split"]]["ceiling"] = values["ceiling"]
    others = values.get("splits", {})
    return main | {split: {key: one[key] for key in keys} for split, one in others.items() if split not in main}


def measure_numbers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return mse, mae, means and rows of each split of the predictions of a label that is a number."""
    columns: dict[str, list[np.ndarray]] = {}
    for path in sorted(folder.glob("*.parquet")):
        split = path.name.rpartition("-")[0]
        table = pq.read_table(path, columns=["prediction", "label", "weight"], partitioning=None)
        columns.setdefault(split, []).append(np.stack([column.to_numpy().astype(np.float64) for column in table]))
    found = {}
    for split, parts in columns.items():
        prediction, label, weight = np.concatenate(parts, axis=1)
        total = float(weight.sum())
        error = prediction - label
        sums = {"mse": error**2, "mae": np.abs(error), "mean_prediction": prediction, "mean_label": label}
        means = {name: float(weight @ one) / total if total else None for name, one in sums.items()}
        found[split] = {**means, "rows": int(np.count_nonzero(weight))}
    return found


def kinds_of(tasks: Path) -> dict[str, str]:
    """Return what each answer is, label, joint or number, as its files say: labels in the order of the schema, then
    joint ones. tasks: the folder that has a folder for each answer."""
    told = {one.name: _metadata_of(one / PREDICTIONS) for one in sorted(tasks.iterdir())}
    ordered = sorted(told, key=lambda name: int(told[name].get(PLACE, b"0")))
    return {name: told[name].get(ANSWER, b"label").decode() for name in ordered}


def _metadata_of(folder: Path) -> Mapping[bytes, bytes]:
    path = next(iter(sorted(folder.glob("*.parquet"))), None)
    if path is None:
        raise DataError(f"{folder}: no parquet file in this folder; expected at least one")
    return pq.read_schema(path).metadata or {}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _page(folder: Path, values: dict[str, Any], kinds: Mapping[str, str]) -> Page:
    history = read_history(folder / "metrics.jsonl")
    watched = max(history.evaluations, key=lambda split: len(history.evaluations[split]["step"]), default="valid")
    return Page(
        title=folder.resolve().name,
        subtitle=about.subtitle(folder),
        splits={},
        ceiling=None,
        quality_plots=[],
        training_plots=training_plots(history, watched, None),
        table_plots=table_plots(history),
        slices=[],
        history=history,
        texts=about.texts(folder),
        versions=about.versions(folder),
        tasks=_table(values, kinds),
        said=lead(values),
    )


def _table(values: Mapping[str, Any], kinds: Mapping[str, str]) -> Table:
    """Return a table with a row for each answer, whose name leads to its report."""
    keys = ("auc", "logloss", "normalized_entropy", "calibration", "observed_rate", "rows")
    titles = {definition.key: definition.title for definition in DEFINITIONS}
    has_ceiling = any("ceiling" in one for one in values["tasks"].values())
    has_numbers = "number" in kinds.values()
    rows = []
    for name, one in values["tasks"].items():
        is_number = kinds[name] == "number"
        link = Markup('<a href="tasks/{0}/report.html">{0}</a>').format(name)
        cells = [number(one[key]) if key in one else "" for key in keys]
        best = number(one["ceiling"]["auc"]) if "ceiling" in one else ""
        errors = [number(one[key]) if key in one else "" for key in ("mse", "mae")]
        rows.append([name if is_number else link, *cells, *[best] * has_ceiling, *errors * has_numbers])
    head = [titles[key] for key in keys] + ["best possible AUC"] * has_ceiling + ["MSE", "MAE"] * has_numbers
    return Table(["label", *head], rows)
