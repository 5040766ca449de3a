"""A made-up run folder: predictions, log, configuration, plan, versions and teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CONFIG = """data:
  name: made_up
  path: /data/<script>alert(1)</script>
model:
  target: tessera.ctr.models.deepfm.DeepFM
  dim: 16
trainer:
  batch_size: 4096
"""
PLAN = """table      rows    dim  sharding   bytes per rank
user_id    1,000    16  row-wise    32.0 KiB
item_id    2,000    16  row-wise    64.0 KiB"""


def columns(seed: int, rows: int, rate: float = -3.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    logit = generator.normal(rate, 1.2, rows)
    prediction = 1 / (1 + np.exp(-logit))
    truth = 1 / (1 + np.exp(-(logit * 1.1 + 0.15)))
    return {
        "prediction": prediction.astype(np.float32),
        "label": (generator.random(rows) < truth).astype(np.float32),
        "weight": np.ones(rows, np.float32),
        "group": generator.integers(0, max(1, rows // 20), rows),
    }


def write_predictions(folder: Path, name: str, values: dict, split: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(values)
    if split:
        index = pa.array(np.zeros(table.num_rows, np.int8))
        table = table.append_column("split", pa.DictionaryArray.from_arrays(index, pa.array([split])))
    path = folder / name
    pq.write_table(table, path)
    return path


def metrics_lines(steps: int = 2000) -> list[dict]:
    generator = np.random.default_rng(1)
    lines = []
    for step in range(10, steps + 1, 10):
        lines.append(
            {
                "kind": "train",
                "step": step,
                "epoch": 0,
                "rows": 40960,
                "loss": 0.16 + 0.2 * np.exp(-step / 250) + generator.normal(0, 0.004),
                "samples_per_second": 81000 + generator.normal(0, 3000),
                "reader_wait": float(np.clip(0.04 + generator.normal(0, 0.01), 0, 1)),
                "dense_lr": 1e-3 * min(1, step / 200),
                "sparse_lr": 2e-2 * min(1, step / 200),
                "seconds": step * 0.05,
            }
        )
        if step % 250 == 0:
            auc = 0.79 - 0.12 * np.exp(-step / 400)
            line = {
                "kind": "eval",
                "split": "valid",
                "step": step,
                "auc": auc,
                "logloss": 0.165 + 0.1 * np.exp(-step / 300),
            }
            lines.append({**line, "normalized_entropy": 0.85, "calibration": 1.01})
    lines.append({**lines[-1], "split": "test", "auc": 0.788})
    lines.append({"kind": "bad_rows", "split": "train", "step": 0, "counts": {"label not 0 or 1": 12}})
    return lines


def table_line(step: int, tables: dict[str, dict[str, int]]) -> dict:
    """A line of dynamic tables with the totals that belong to it."""
    keys = ("rows", "bytes", "new", "admitted", "rejected", "expired", "evicted")
    total = {key: sum(one[key] for one in tables.values()) for key in keys}
    return {"kind": "tables", "step": step, **total, "tables": tables}


def table_lines(steps: int = 2000) -> list[dict]:
    """Three tables that grow, of which one has a TTL and one a limit; `hour` is small and soon complete."""
    lines = []
    for step in range(10, steps + 1, 10):
        users, items = int(900 * step**0.8), int(60_000 * (1 - np.exp(-step / 700)))
        expired, evicted = max(0, 12 * (step - 600)), max(0, items - 40_000)
        lines.append(
            table_line(
                step,
                {
                    "hour": counts(24, 4_096, 24),
                    "user & <id>": counts(users - expired, 152 * users, users, rejected=3 * users, expired=expired),
                    "item_id": counts(items - evicted, 152 * (items - evicted), items, evicted=evicted),
                },
            )
        )
    return lines


def counts(rows: int, size: int, admitted: int, rejected: int = 0, expired: int = 0, evicted: int = 0) -> dict:
    came = {"new": admitted + rejected, "admitted": admitted, "rejected": rejected}
    return {"rows": rows, "bytes": size, **came, "expired": expired, "evicted": evicted}


def make_run(folder: Path, rows: int = 20000) -> Path:
    """A complete run folder with splits valid and test, the latter over two files."""
    predictions = folder / "predictions"
    write_predictions(predictions, "valid-00000.parquet", columns(0, rows), "valid")
    test = columns(1, rows)
    half = rows // 2
    write_predictions(predictions, "test-00000.parquet", {k: v[:half] for k, v in test.items()}, "test")
    write_predictions(predictions, "test-00001.parquet", {k: v[half:] for k, v in test.items()}, "test")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics_lines() + table_lines()))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "plan.txt").write_text(PLAN)
    (folder / "versions.json").write_text(json.dumps({"python": "3.11.2", "torch": "2.13.0"}))
    splits = {name: {"auc": 0.8091, "logloss": 0.2172} for name in ("train", "valid", "test")}
    (folder / "teacher.json").write_text(json.dumps({"splits": splits}))
    return folder
