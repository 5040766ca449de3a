"""Small parquet data sets, and batches taken apart into rows again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tessera.ctr.data.batch import Batch
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema


def write(folder: Path, *tables: pa.Table | dict, row_group_size: int = 1000, **options) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i, table in enumerate(tables):
        table = pa.table(table) if isinstance(table, dict) else table
        pq.write_table(table, folder / f"part-{i}.parquet", row_group_size=row_group_size, **options)
    return str(folder)


def features(*configs: str | dict, **schema) -> Schema:
    """A schema of these features; a string is an integer id of that name."""
    configs = [{"name": c} if isinstance(c, str) else c for c in configs]
    return Schema.from_config({"features": configs, **schema})


def taken_apart(batch: Batch) -> list[dict[str, Any]]:
    """The real rows of a batch; each key of the ids gives a list, or a list of (id, weight)."""
    lengths = batch.ids.lengths().view(len(batch.ids.keys()), len(batch.weight))
    per_key = [part.tolist() for part in batch.ids.values().split(lengths.sum(1).tolist())]
    if batch.ids.weights_or_none() is not None:
        weights = batch.ids.weights().split(lengths.sum(1).tolist())
        per_key = [list(zip(v, w.tolist(), strict=True)) for v, w in zip(per_key, weights, strict=True)]
    rows = []
    starts = [0] * len(per_key)
    for i in range(batch.rows):
        ids = {}
        for k, key in enumerate(batch.ids.keys()):
            stop = starts[k] + int(lengths[k, i])
            ids[key] = per_key[k][starts[k] : stop]
            starts[k] = stop
        row = {"ids": ids, "numeric": batch.numeric[i].tolist(), "labels": batch.labels[i].tolist()}
        row["weight"] = batch.weight[i].item()
        row["group"] = None if batch.group is None else batch.group[i].item()
        row["time"] = None if batch.time is None else batch.time[i].item()
        rows.append(row)
    assert starts == [len(values) for values in per_key], "padding rows hold ids"
    return rows


def read_in_order(path: str, schema: Schema, **options) -> list[dict[str, Any]]:
    """All rows in the order of the files."""
    options = {"batch_size": 7, "lanes": 1, "shuffle": False, **options}
    reader = ParquetReader(path, schema, **options)
    return [row for batch in reader.epoch(0) for row in taken_apart(batch)]


def ids_of(path: str, schema: Schema, name: str, **options) -> list[list[int]]:
    return [row["ids"][name] for row in read_in_order(path, schema, **options)]
