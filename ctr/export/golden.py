"""Golden rows of an export: rows of the data and awkward ones, with the scores of training's own evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config
from tessera.ctr.data.config import SPLITS, paths_of, schema_of
from tessera.ctr.data.footers import value_type
from tessera.ctr.data.listing import Listing
from tessera.ctr.data.schema import Feature, Schema, gives_ids, length_of
from tessera.ctr.runs.score_rows import row_reader
from tessera.ctr.serving.rows import RowDecoder
from tessera.ctr.serving.scorer import answers_of
from tessera.embedding.errors import TesseraError

ROWS = 64  # of the data
UNKNOWN = 0x7E55E4A0  # begins ids that no data have


def golden_rows(config: Config, schema: Schema, paths: Sequence[str | Listing] | None = None) -> pa.Table:
    """Return the columns of features of some rows: the first of the data where they can be read, and rows with a null
    in each column in turn and with ids that no table knows.

    paths: of the data; None: the configuration's splits.
    """
    decoder = RowDecoder(schema)
    found = _of_data(config, decoder, paths)
    if found is None:
        found = pa.table({name: _made_up(name, schema) for name in decoder.columns})
    one = found.slice(0, 1)
    together = [sorted(decoder.read_by(feature)) for feature in (*schema.stored, *schema.crosses)]
    awkward = [_with_nulls(one, names) for names in [*together, decoder.columns]]
    numbers = {f.weights for f in schema.stored if f.weights}
    numbers |= {c for f in schema.stored if f.kind in ("numeric", "vector") or not gives_ids(f) for c in f.columns}
    return pa.concat_tables([found, *awkward, _unknown(one, numbers)]).combine_chunks()


def _of_data(config: Config, decoder: RowDecoder, chosen: Sequence[str | Listing] | None) -> pa.Table | None:
    for split in reversed(SPLITS):
        try:
            paths = chosen or paths_of(config.data, split)
            if not paths:
                continue
            file = row_reader(config, paths).groups.files[0]
            with file.open() as opened:
                table = opened.read_row_group(0, decoder.columns).slice(0, ROWS)
            decoder.decode(decoder.table(table))
            if table.num_rows:
                return table
        except (TesseraError, OSError, pa.ArrowException):  # the data may be gone, or hold bad rows
            continue
    return None


def _with_nulls(one: pa.Table, names: Sequence[str]) -> pa.Table:
    columns = {
        name: pa.chunked_array([pa.nulls(1, column.type)]) if name in names else column
        for name, column in zip(one.column_names, one.columns, strict=True)
    }
    return pa.table(columns, schema=one.schema.remove_metadata()).cast(one.schema)


def _unknown(one: pa.Table, numbers: Container[str]) -> pa.Table:
    """Return a row whose ids no table knows, where the column's type can hold one. numbers: columns that are read as
    numbers too, which stay: crosses of high degree would make of such a number one that no float holds."""
    columns = {}
    for name, column in zip(one.column_names, one.columns, strict=True):
        kind = column.type
        value = value_type(kind)
        if name in numbers:
            pass
        elif pa.types.is_int64(value) or pa.types.is_uint64(value):
            column = pa.chunked_array([pa.array([UNKNOWN], value).cast(kind)])
        elif pa.types.is_list(kind) and pa.types.is_integer(kind.value_type) and kind.value_type.bit_width == 64:
            column = pa.chunked_array([pa.array([[UNKNOWN] * len(one or []) for one in column.to_pylist()], kind)])
        elif pa.types.is_string(kind):
            column = pa.chunked_array([pa.array([str(UNKNOWN)])])
        columns[name] = column
    return pa.table(columns)


def _made_up(name: str, schema: Schema) -> pa.Array:
    """Return values of a column without data to take them from."""
    numbers = np.arange(8)
    readers = [f for f in schema.stored if name in f.columns]
    kinds = [feature.expression.kinds[name] for feature in readers if feature.expression]
    if len(kinds) == len(readers):
        texts = pa.array([f"2026-01-0{1 + i}" for i in range(8)])
        return pa.array(numbers - 2.5) if pa.types.is_floating(kinds[0]) else texts.cast(kinds[0])
    if any(name == feature.weights for feature in readers):
        return pa.array([[0.5] * (i % 3) for i in range(8)], pa.list_(pa.float32()))
    if any(feature.column == name for feature in schema.number_sequences):
        return pa.array([[i - 2.5] * (i % 3) for i in range(8)], pa.list_(pa.float32()))
    lengths = [length_of(feature) for feature in readers if feature.kind == "vector"]
    if lengths:
        return pa.array([[i - 2.5 + k / 4 for k in range(lengths[0])] for i in range(8)], pa.list_(pa.float32()))
    ids = [feature for feature in readers if feature.kind != "numeric"]
    if not ids:
        return pa.array(numbers - 2.5)
    feature: Feature = ids[0]
    if feature.kind == "id":
        return pa.array(numbers) if feature.dtype == "int" else pa.array([f"{i:x}" for i in range(8)])
    items = [[i if feature.dtype == "int" else f"{i:x}"] * (i % 3) for i in range(8)]
    if feature.delimiter is not None:
        return pa.array([feature.delimiter.join(map(str, one)) for one in items])
    return pa.array(items, pa.list_(pa.int64() if feature.dtype == "int" else pa.string()))


@torch.no_grad()
def scores_of(model: DistributedModelParallel, config: Config, rows: pa.Table) -> np.ndarray:
    """Return what evaluation gives for rows, read by training's reader: float32 [n], or [n, labels]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.parquet"
        pq.write_table(rows, path)
        reader = row_reader(config, [str(path)])
        model.eval()
        numbers = [place for place, task in enumerate(schema_of(config.data).tasks) if task.is_number]
        found: dict[int, np.ndarray] = {}
        for batch in reader.epoch(0):
            found_here = answers_of(model(batch)[0], numbers)
            assert batch.number is not None
            found |= dict(zip(batch.number[: batch.rows].tolist(), found_here.numpy(), strict=False))
    return np.array([found[number] for number in range(rows.num_rows)], np.float32)
