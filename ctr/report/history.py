"""Read the history of a run: its `metrics.jsonl` as series over steps."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tessera.ctr.data.errors import DataError

TRAIN = ("step", "rows", "loss", "dense_lr", "sparse_lr", "samples_per_second", "reader_wait", "seconds")
EVALUATION = ("step", "auc", "logloss", "normalized_entropy", "calibration")
TABLE_COUNTS = ("rows", "bytes", "new", "admitted", "rejected", "expired", "evicted")


@dataclass(frozen=True)
class TableCounts:
    """Counts of dynamic tables at a step: what they held, and what had happened in them by then, as logged
    (TABLE_COUNTS)."""

    step: int
    total: dict[str, int]
    by_table: dict[str, dict[str, int]]


@dataclass
class History:
    """Series by name, float64, NaN where a line lacks the value; the series of one source are of one length.

    train: names of TRAIN. evaluations: split -> names of EVALUATION. left_out: split -> reason -> rows.
    tables: "step" and names of TABLE_COUNTS, over all tables; last_tables: None without dynamic tables.
    scored_step: of the model that the run scored at its end; None where it does not say.
    """

    train: dict[str, np.ndarray] = field(default_factory=dict)
    evaluations: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    last_tables: TableCounts | None = None
    scored_step: int | None = None


def read_history(path: Path, task: str = "") -> History:
    """Read the log, with the evaluations of one of several labels (`task`), or those of all. No file is an empty
    history. A last line without its end (a crash) is passed over.

    A run that went back to a checkpoint has logged some steps twice: the later line of training counts. Of
    evaluations the first counts: the run's end scores the best model again, which stands at its own step. Of
    tables, which have a state, what was logged of the same and later steps is undone.

    Raises:
        DataError: a line that is not a JSON object with a kind and a step, or a last line of tables without its
            counts; names the file and line.
    """
    if not path.is_file():
        return History()
    *lines, tail = path.read_text(encoding="utf-8").split("\n")
    train: dict[int, dict] = {}
    evaluations: dict[str, dict[int, dict]] = {}
    tables: dict[int, dict] = {}
    last_tables = 0
    history = History()
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        line = _parse(path, number, text)
        if line["kind"] == "train":
            train[line["step"]] = line
        elif line["kind"] == "eval":
            of_task = line | {name: line.get(f"{task}.{name}") for name in EVALUATION[1:]} if task else line
            evaluations.setdefault(str(line.get("split", "valid")), {}).setdefault(line["step"], of_task)
            history.scored_step = line["step"] if "model" in line else history.scored_step
        elif line["kind"] == "tables":
            while tables and next(reversed(tables)) >= line["step"]:
                tables.popitem()
            tables[line["step"]] = line
            last_tables = number
        elif line["kind"] == "bad_rows":
            history.left_out[str(line.get("split"))] = dict(line.get("counts") or {})
    history.train = _series(train, TRAIN)
    history.evaluations = {split: _series(lines, EVALUATION) for split, lines in evaluations.items()}
    if tables:
        history.tables = _series(tables, ("step", *TABLE_COUNTS))
        history.last_tables = _table_counts(path, last_tables, next(reversed(tables.values())))
    return history


def _parse(path: Path, number: int, text: str) -> dict:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        line = None
    if not isinstance(line, dict) or "kind" not in line or not isinstance(line.get("step"), int):
        raise DataError(f'{path}: line {number} is {text[:60]!r}; expected a JSON object with "kind" and "step"')
    return line


def _table_counts(path: Path, number: int, line: dict) -> TableCounts:
    try:
        total, *by_table = (
            {key: operator.index(one[key]) for key in TABLE_COUNTS} for one in (line, *line["tables"].values())
        )
    except (KeyError, TypeError, AttributeError):
        expected = f'whole numbers {", ".join(TABLE_COUNTS)}, in all and for each of "tables"'
        raise DataError(f"{path}: line {number} is {json.dumps(line)[:60]!r}; expected {expected}") from None
    return TableCounts(line["step"], total, dict(zip(line["tables"], by_table, strict=True)))


def _series(lines: dict[int, dict], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    ordered = [lines[step] for step in sorted(lines)]
    return {name: np.array([_number(line.get(name)) for line in ordered], dtype=np.float64) for name in names}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
