"""A small job whose data tell which rows were trained, and what two runs of it must have in common."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tessera.distributed.saved.compact import newest_rows
from tessera.distributed.saved.dense import load_tensors
from tessera.distributed.saved.manifest import SavedFolder, files_listed, read_manifest
from tessera.distributed.saved.storage import Storage

SCHEMA = (
    "data.schema.features=[{name: x, kind: numeric}, {name: row, kind: id}, {name: c, kind: id}, {name: d, kind: id}]"
)
#: What a clock or the reserved memory of a process says; a new process has other values.
GAUGES = ("samples_per_second", "reader_wait", "seconds", "bytes")


def write_data(folder: Path, rows: int, valid: int = 200, seed: int = 0, extra: str | None = None) -> Path:
    """Column `row` is different in every row, so that its table's counts say how often each row was trained.

    extra: one more column of ids.
    """
    generator = np.random.default_rng(seed)
    for name, count in (("train", rows), ("valid", valid)):
        (folder / name).mkdir(parents=True)
        x = generator.normal(size=count).astype(np.float32)
        c = generator.zipf(1.5, count).clip(max=300)
        table = pa.table(
            {
                "label": (generator.random(count) < 1 / (1 + np.exp(-x - (c % 3)))).astype(np.int8),
                "time": np.sort(generator.integers(0, 86400 * 20, count)) + 20454 * 86400,
                "x": x,
                "row": np.arange(count),
                "c": c,
                "d": generator.integers(0, 1 << 20, count),
            }
        )
        if extra:
            table = table.append_column(extra, pa.array(generator.integers(0, 50, count)))
        pq.write_table(
            table, folder / name / "part.parquet", row_group_size=max(1, rows // 20), write_page_checksum=True
        )
    return folder


def arguments(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    fixed = ["data=synthetic", SCHEMA, "data.schema.time=time", "data.test=null", "data.lanes=12"]
    small = ["model.hidden=[8]", "model.embedding_dim=4", "model.dropout=0.2", "data.window_rows=64"]
    loop = ["trainer.device=cpu", "trainer.log_every=3", "trainer.timeout_seconds=60", "trainer.threads=1"]
    return [*fixed, *small, *loop, f"data.path={data}", f"trainer.run_dir={run_dir}", *overrides]


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def rows_of_state(state: Path, kind: str = "rows", numbers: bool = True) -> dict[str, dict[int, dict[str, bytes]]]:
    """table -> id -> column -> bytes, of a state and those it builds on, whatever the number of ranks."""
    found: dict[str, dict] = {}
    chain = [link["name"] for link in json.loads((state / "manifest.json").read_text())["chain"]]
    folders = [Storage(state), *(Storage(state.parent / name) for name in reversed(chain))]
    for path in sorted((state / kind).glob("*/*.parquet")):
        table = found.setdefault(path.parent.name, {})
        for columns in newest_rows(folders if kind == "rows" else folders[:1], str(path.relative_to(state))):
            ids = columns.pop("id").tolist()
            if not numbers:
                columns.pop("row", None)
            for place, one in enumerate(ids):
                assert one not in table, f"{path}: id {one} twice"
                table[one] = {name: _bytes_of(column[place]) for name, column in columns.items()}
    return found


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16


def open_folder(folder: Path) -> SavedFolder:
    storage = Storage(folder)
    return SavedFolder(storage, files_listed(read_manifest(storage)))


def tensors_of_state(state: Path, prefix: str = "") -> dict[str, bytes]:
    found = load_tensors(open_folder(state), lambda name: name.startswith(prefix))
    return {name: value.numpy().tobytes() for name, value in found.items()}


def training_of_state(state: Path) -> dict:
    training = json.loads((state / "training.json").read_text())
    del training["log"]["metrics_bytes"]
    for key in ("run_dir", "resume", "max_steps"):
        training["config"]["trainer"].pop(key)
    return _without_gauges(training)


def metrics_of(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return _without_gauges(lines)


def _without_gauges(node: Any) -> Any:
    return without(node, GAUGES)


def without(node: Any, keys: Collection[str]) -> Any:
    """The same lists and dicts without these keys, at any depth."""
    if isinstance(node, list):
        return [without(one, keys) for one in node]
    if isinstance(node, dict):
        return {key: without(value, keys) for key, value in node.items() if key not in keys}
    return node


def assert_same_end(run_dir: Path, expected: Path, but: Collection[str] = ()) -> None:
    """Bit for bit: dense side, tables with their row numbers, reader, counters, metrics, best model. `but`: keys of
    what is told of training that may differ."""
    mine, other = newest(run_dir), newest(expected)
    assert mine.name == other.name
    assert tensors_of_state(mine) == tensors_of_state(other)
    for kind in ("rows", "waiting"):
        assert rows_of_state(mine, kind) == rows_of_state(other, kind)
    assert without(training_of_state(mine), but) == without(training_of_state(other), but)
    assert metrics_of(run_dir) == metrics_of(expected)
    assert tensors_of_state(run_dir / "best") == tensors_of_state(expected / "best")
    assert rows_of_state(run_dir / "best") == rows_of_state(expected / "best")


def times_trained(state: Path) -> torch.Tensor:
    """For each row of the training data, how often it was trained: int64 [rows]."""
    counts = {i: int.from_bytes(row["count"], "little") for i, row in rows_of_state(state)["row"].items()}
    return torch.tensor([counts.get(i, 0) for i in range(max(counts) + 1)])
