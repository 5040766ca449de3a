"""Small days whose data tell which rows were trained, and what two runs over them must have in common."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tessera.ctr.data.day_folders import DayFolders
from tests.ctr.train.states import (
    arguments,
    newest,
    rows_of_state,
    tensors_of_state,
    training_of_state,
    without,
)

#: What a clock or the memory of a process says.
GAUGES = ("samples_per_second", "evaluate_seconds", "train_seconds", "bytes")
OPTIONS = [
    "+data.schema.group=c",
    "trainer.batch_size=50",
    "trainer.log_every=100",
    "daily.report=false",
    "daily.bands.window=0",
    "export.published=false",
    "embedding.ttl_days=3",
    "optimizer.sparse.name=adam",
    "optimizer.sparse.lr=0.02",
    "optimizer.dense.lr=0.01",
]


def folder_of(data: Path, key: str) -> Path:
    """The folder of a day, or of an hour of it."""
    return Path(data) / DayFolders().folder_of(key)


def key_of(day: int) -> str:
    return f"2026-01-{day + 1:02d}"


def write_day(folder: Path, day: int, rows: int = 300, flipped: float = 0.0, seed: int = 0) -> Path:
    """day=…/part-0 and part-1. Column `row` is different in every row of all days. Labels follow x, c and d. Each day
    some values of d come and some go. flipped: share of labels that are turned round."""
    draw = np.random.default_rng([seed, day])
    x = draw.normal(size=rows).astype(np.float32)
    c, d = draw.zipf(1.5, rows).clip(max=50), 20 * day + draw.integers(0, 60, rows)
    label = draw.random(rows) < 1 / (1 + np.exp(-2 * x - (c % 3) + (d % 2) * 2))
    label ^= draw.random(rows) < flipped
    table = pa.table(
        {
            "label": label.astype(np.int8),
            "time": np.sort(draw.integers(86400 * day, 86400 * (day + 1), rows)) + 20454 * 86400,
            "x": x,
            "row": day * 1_000_000 + np.arange(rows),
            "c": c,
            "d": d,
        }
    )
    path = folder / f"day={key_of(day)}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for part, (begin, count) in enumerate(((0, rows // 3), (rows // 3, rows - rows // 3))):
        pq.write_table(
            table.slice(begin, count),
            path / f"part-{part}.parquet",
            row_group_size=max(1, rows // 5),
            write_page_checksum=True,
        )
    return path


def write_days(folder: Path, days: int, rows: int = 300) -> Path:
    for day in range(days):
        write_day(folder, day, rows)
    return folder


def command(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    return arguments(data, run_dir, *OPTIONS, *overrides)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "days.jsonl").read_text().splitlines()]


def without_gauges(node: Any) -> Any:
    if isinstance(node, list):
        return [without_gauges(one) for one in node]
    if isinstance(node, dict):
        return {key: without_gauges(value) for key, value in node.items() if key not in GAUGES}
    return node


def served(run_dir: Path) -> dict[str, Any]:
    """The chain that `latest` names, and the content of every publication there is."""
    root = run_dir / "published"
    latest = json.loads((root / "latest").read_text())
    found = {"chain": [link["name"] for link in latest["chain"]], "step": latest["step"]}
    for folder in sorted(root.glob("2*")):
        rows = {path.parent.name: pq.read_table(path).sort_by("id") for path in folder.glob("rows/*/*-of-*1.parquet")}
        gone = {str(path.relative_to(folder)): pq.read_table(path) for path in folder.glob("gone/*/*.parquet")}
        found[folder.name] = tensors_of_state(folder), rows, gone, rows_of_state(folder)
    return found


def predictions(run_dir: Path) -> dict[str, dict]:
    paths = sorted(run_dir.glob("days/*/predictions/*.parquet"))
    return {str(path.relative_to(run_dir)): pq.read_table(path).to_pydict() for path in paths}


def assert_same_life(run_dir: Path, expected: Path, published: bool = True, but: Collection[str] = ()) -> None:
    """Bit for bit: the newest state, records, predictions and, if asked, publications. `but`: keys that may differ."""
    mine, other = newest(run_dir), newest(expected)
    assert mine.name == other.name
    assert tensors_of_state(mine) == tensors_of_state(other)
    for kind in ("rows", "waiting"):
        assert rows_of_state(mine, kind) == rows_of_state(other, kind)
    but = but if published else (*but, "published_bytes")
    told = [without(without_gauges(records(folder)), but) for folder in (run_dir, expected)]
    assert told[0] == told[1]
    one, two = (without(without_gauges(training_of_state(state)), but) for state in (mine, other))
    assert _without_published_bytes(one) == _without_published_bytes(two)
    if published:
        assert served(run_dir) == served(expected)
    assert predictions(run_dir) == predictions(expected)


def _without_published_bytes(training: dict) -> dict:
    """Of the last day it is known a moment after its state was saved."""
    for record in training["daily"]["records"]:
        record.pop("published_bytes", None)
    return training


def times_trained(state: Path, days: int, rows: int) -> list[list[int]]:
    """For each day how often each of its rows was trained; 0 where the row has expired."""
    counts = {i: int.from_bytes(row["count"], "little") for i, row in rows_of_state(state)["row"].items()}
    return [[counts.get(day * 1_000_000 + i, 0) for i in range(rows)] for day in range(days)]
