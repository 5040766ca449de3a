"""Rows of dynamic tables as parquet files, by id: any number of ranks can load what any number has saved.

One file per table and rank, `<table>/<rank>-of-<ranks>.parquet`, with columns id, values, state, last_seen and count.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distributed.ownership import owner_of
from distributed.process import Process
from embedding.errors import TesseraError
from embedding.table import DynamicTable, RowBatch
from kernels.mix import mix64

BATCH_ROWS = 1 << 16


def save_tables(tables: dict[str, DynamicTable], folder: Path, process: Process) -> None:
    """Write this rank's rows of each table."""
    for name, table in tables.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        path = folder / name / f"{process.rank:05d}-of-{process.world_size:05d}.parquet"
        width, state_width = table.config.width, table.config.state_width
        schema = pa.schema(
            {
                "id": pa.int64(),
                "values": pa.list_(pa.float32(), width),
                "state": pa.list_(pa.float32(), state_width),
                "last_seen": pa.int64(),
                "count": pa.int64(),
            }
        )
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in table.export_rows(BATCH_ROWS):
                columns = [
                    batch.ids.numpy(),
                    _lists(batch.values, width),
                    _lists(batch.state, state_width),
                    batch.last_seen.numpy(),
                    batch.count.numpy(),
                ]
                arrays = [pa.array(column) if isinstance(column, np.ndarray) else column for column in columns]
                writer.write_batch(pa.record_batch(arrays, schema=schema))


def load_tables(tables: dict[str, DynamicTable], folder: Path, process: Process) -> None:
    """Fill this rank's empty tables with the saved rows that it owns.

    Raises:
        TesseraError: a table's folder is missing, or its rows have another width.
    """
    for name, table in tables.items():
        files = sorted((folder / name).glob("*.parquet"))
        if not files:
            raise TesseraError(f"{folder / name} holds no rows of table {name}; expected one file per rank")
        for path in files:
            file = pq.ParquetFile(path)
            _check_widths(path, file.schema_arrow, table)
            for batch in file.iter_batches(BATCH_ROWS):
                _import(table, batch, process)


def _import(table: DynamicTable, batch: pa.RecordBatch, process: Process) -> None:
    ids = _numbers(batch, "id")
    mine = owner_of(mix64(ids), process.world_size) == process.rank
    width, state_width = table.config.width, table.config.state_width
    table.import_rows(
        RowBatch(
            ids=ids[mine],
            values=_matrix(batch.column("values"), width)[mine],
            state=_matrix(batch.column("state"), state_width)[mine],
            last_seen=_numbers(batch, "last_seen")[mine],
            count=_numbers(batch, "count")[mine],
        )
    )


def _check_widths(path: Path, schema: pa.Schema, table: DynamicTable) -> None:
    expected = {"values": table.config.width, "state": table.config.state_width}
    for column, width in expected.items():
        found = schema.field(column).type.list_size
        if found != width:
            raise TesseraError(f"{path}: column {column} has {found} floats per row; the model has {width}")


def _lists(matrix: Tensor, width: int) -> pa.Array:
    flat = pa.array(matrix.contiguous().view(-1).numpy())
    return pa.FixedSizeListArray.from_arrays(flat, width) if width else _empty_lists(matrix.shape[0])


def _empty_lists(rows: int) -> pa.Array:
    """Arrow cannot infer how many lists of length 0 there are from their values."""
    return pa.array([[]] * rows, pa.list_(pa.float32(), 0))


def _numbers(batch: pa.RecordBatch, column: str) -> Tensor:
    """int64 [n], copied: Arrow's memory is read-only, which torch warns about."""
    return torch.from_numpy(batch.column(column).to_numpy().copy())


def _matrix(lists: pa.Array, width: int) -> Tensor:
    if width == 0:
        return torch.empty(len(lists), 0)
    return torch.from_numpy(lists.flatten().to_numpy().reshape(len(lists), width).copy())
