"""Write what a run tells of its days: `days.jsonl`, one line each, and a folder with predictions and report for
each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tessera.ctr.daily.day_record import COUNTS, METRICS, OF_NUMBERS, DayRecord
from tessera.ctr.metrics.exact import evaluate_predictions
from tessera.ctr.metrics.tasks import mean_of
from tessera.ctr.report.report import write_report
from tessera.ctr.report.result import PREDICTIONS, TASKS
from tessera.ctr.report.task_reports import kinds_of, measure_numbers
from tessera.distributed.atomic import write_text

DAYS, FOLDER = "days.jsonl", "days"


def measure(predictions: Path) -> dict[str, Any]:
    """Exact metrics of the predictions of a day, of all rows and of those without (`known`) and with (`new`) ids that
    had no row; these are None where no rows are, or where it is not known which.

    With several labels those of each answer are in `tasks`, and the day's own are means over the labels that are no
    numbers.
    """
    tasks = predictions.parent / TASKS
    if not tasks.is_dir():
        return _measured(predictions)
    kinds = kinds_of(tasks)
    probable = [name for name, kind in kinds.items() if kind != "number"]
    found = {name: _measured(tasks / name / PREDICTIONS) for name in probable}
    labels = [found[name] for name in probable if kinds[name] == "label"]
    whole = _means(labels)
    for part in ("known", "new"):
        parts = [one[part] for one in labels if one[part] is not None]
        whole[part] = _means(parts) if parts else None
    whole["tasks"] = {name: {key: one[key] for key in COUNTS + METRICS} for name, one in found.items()}
    for name, kind in kinds.items():
        if kind == "number":
            (errors,) = measure_numbers(tasks / name / PREDICTIONS).values()  # a day is one split
            whole["tasks"][name] = {key: errors[key] for key in OF_NUMBERS}
    whole["rows"] = max(one["rows"] for one in whole["tasks"].values())
    return whole


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each metric, None where one is undefined; and the most rows and positives."""
    means: dict[str, Any] = {name: max((one[name] for one in found), default=0) for name in COUNTS}
    return means | {name: mean_of([one[name] for one in found]) for name in METRICS}


def _measured(folder: Path) -> dict[str, Any]:
    columns: dict[str, list[np.ndarray]] = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        for name in ("prediction", "label", "weight", "group", "new_ids"):
            if name in table.column_names:
                columns.setdefault(name, []).append(table[name].to_numpy())
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    is_new = joined.pop("new_ids", None)
    measured = _metrics(joined)
    for name, chosen in (("known", None if is_new is None else ~is_new), ("new", is_new)):
        some = chosen is not None and chosen.any()
        measured[name] = _metrics({key: values[chosen] for key, values in joined.items()}) if some else None
    return measured


def _metrics(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found = evaluate_predictions(**columns)
    return {name: found[name] for name in COUNTS + METRICS}


def write_records(run_dir: Path, records: Sequence[DayRecord]) -> None:
    """Replace days.jsonl, in order of the partitions, in one rename."""
    ordered = sorted(records, key=lambda record: record.partition)
    text = "".join(json.dumps(record.to_json()) + "\n" for record in ordered)
    path = run_dir / DAYS
    if path.exists() and path.read_text() == text:
        return
    write_text(path, text)


def day_dir(run_dir: Path, partition: str) -> Path:
    return run_dir / FOLDER / partition


def clear_day(run_dir: Path, partition: str) -> None:
    """Remove what an evaluation that did not end may have left, also one by another number of ranks."""
    shutil.rmtree(day_dir(run_dir, partition), ignore_errors=True)


def write_day_report(run_dir: Path, record: DayRecord, steps_before: int) -> None:
    """report.json and report.html of one day, if not there, in its folder, which becomes a run's folder in small: the
    steps of that day, what it was trained with, and how good a model can be where the data tell."""
    folder = day_dir(run_dir, record.partition)
    scored = (folder / PREDICTIONS).exists() or (folder / TASKS).exists()
    if (folder / "report.html").exists() or not scored:
        return
    for name in ("config.yaml", "plan.txt", "versions.json"):
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, folder / name)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    own = [line for line in lines if steps_before < json.loads(line)["step"] <= (record.step or 0)]
    (folder / "metrics.jsonl").write_text("".join(line for line in own if json.loads(line)["kind"] != "day"))
    write_report(folder, _teacher(run_dir, record.partition))


def _teacher(run_dir: Path, partition: str) -> dict[str, Any] | None:
    path = run_dir / "teacher.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text()).get("splits", {}).get(f"day={partition}")
    return None if found is None or found["auc"] is None else found
