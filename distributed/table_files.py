"""Rows of dynamic tables as parquet files, by id: any number of ranks can load what any number has saved.

One file per table and rank, `<table>/<rank>-of-<ranks>.parquet`, with columns id, values, last_seen and count, and
state and step_size where rows have them. Values, state and step_size are lists, one group after the other: values as
they are stored (float or halffloat; uint16 bits of bf16; uint8 codes), the others float. The schema's metadata tells
the groups with their dims and formats (`kernels/formats.py` describes these): groups = "v 16 int8, w 1 fp32".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distributed.ownership import owner_of
from distributed.process import Process
from embedding.config import DynamicTableConfig
from embedding.errors import TesseraError
from embedding.table import DynamicTable, RowBatch
from kernels.mix import mix64

BATCH_ROWS = 1 << 16
ARROW = {
    torch.float32: pa.float32(),
    torch.float16: pa.float16(),
    torch.bfloat16: pa.uint16(),
    torch.uint8: pa.uint8(),
}


def save_tables(tables: dict[str, DynamicTable], folder: Path, process: Process) -> None:
    """Write this rank's rows of each table."""
    for name, table in tables.items():
        path = file_of(folder, name, process.rank, process.world_size)
        with rows_writer(path, table.config) as writer:
            for batch in table.export_rows(BATCH_ROWS):
                writer.write_batch(to_arrow(batch, writer.schema))


def load_tables(tables: dict[str, DynamicTable], folder: Path, process: Process) -> None:
    """Fill this rank's empty tables with the saved rows that it owns.

    Raises:
        TesseraError: a table's files are missing or not complete, or its rows have other groups or formats.
    """
    for name, table in tables.items():
        for path in files_of(folder, name):
            for batch in read_rows(path, table.config):
                mine = owner_of(mix64(batch.ids), process.world_size) == process.rank
                columns = {key: value[mine] for key, value in vars(batch).items() if value is not None}
                table.import_rows(RowBatch(**columns))


def file_of(folder: Path, table: str, rank: int, ranks: int) -> Path:
    return folder / table / f"{rank:05d}-of-{ranks:05d}.parquet"


def files_of(folder: Path, table: str) -> list[Path]:
    """The files of one table, one per rank that saved them. Raises TesseraError unless all are there."""
    found = sorted((folder / table).glob("*.parquet"))
    if not found:
        raise TesseraError(f"{folder / table} holds no rows of table {table}; expected one file per rank")
    ranks = int(found[0].stem.rpartition("-")[2])
    expected = [file_of(folder, table, rank, ranks) for rank in range(ranks)]
    if found != expected:
        missing = next((path.name for path in expected if path not in found), "no other ones")
        raise TesseraError(f"{folder / table} holds {len(found)} files of {ranks} ranks; expected {missing}")
    return found


def rows_writer(path: Path, config: DynamicTableConfig) -> pq.ParquetWriter:
    """A writer of what `to_arrow` makes of the table's rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = sum(config.values_columns(group) for group in config.groups)
    fields = {
        "id": pa.int64(),
        "values": pa.list_(ARROW[config.values_dtype], columns),
        "last_seen": pa.int64(),
        "count": pa.int64(),
    }
    if config.state_width:  # Arrow does not read lists of length 0 back
        fields["state"] = pa.list_(pa.float32(), config.state_width)
    if config.has_steps:
        fields["step_size"] = pa.list_(pa.float32(), len(config.groups))
    schema = pa.schema(fields, metadata={"groups": groups_of(config)})
    return pq.ParquetWriter(path, schema, compression="zstd")


def groups_of(config: DynamicTableConfig) -> str:
    """The groups of a table with dims and formats, as files name them."""
    return ", ".join(f"{group.name} {group.dim} {group.format}" for group in config.groups)


def to_arrow(batch: RowBatch, schema: pa.Schema) -> pa.RecordBatch:
    values = batch.values.view(torch.uint16) if batch.values.dtype == torch.bfloat16 else batch.values
    columns = {
        "id": pa.array(batch.ids.numpy()),
        "values": _lists(values),
        "last_seen": pa.array(batch.last_seen.numpy()),
        "count": pa.array(batch.count.numpy()),
    }
    for name, matrix in (("state", batch.state), ("step_size", batch.step_size)):
        if name in schema.names:
            columns[name] = _lists(matrix)
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def read_rows(path: Path, config: DynamicTableConfig) -> Iterator[RowBatch]:
    """Rows of one file, as they are stored. Raises TesseraError where the table has other groups or formats."""
    file = pq.ParquetFile(path)
    found = (file.schema_arrow.metadata or {}).get(b"groups", b"unknown").decode()
    if found != groups_of(config):
        raise TesseraError(
            f"{path}: rows have groups {found}; the model has {groups_of(config)} (scripts/convert_tables.py converts)"
        )
    has_state = "state" in file.schema_arrow.names
    state_width = file.schema_arrow.field("state").type.list_size if has_state else 0
    if state_width != config.state_width:
        raise TesseraError(f"{path}: column state has {state_width} floats per row; the model has {config.state_width}")
    for batch in file.iter_batches(BATCH_ROWS):
        yield RowBatch(
            ids=_numbers(batch, "id"),
            values=_matrix(batch.column("values")).view(config.values_dtype),
            state=_matrix(batch.column("state")) if has_state else torch.empty(batch.num_rows, 0),
            last_seen=_numbers(batch, "last_seen"),
            count=_numbers(batch, "count"),
            step_size=_matrix(batch.column("step_size")) if config.has_steps else None,
        )


def _lists(matrix: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.contiguous().view(-1).numpy()), matrix.shape[1])


def _numbers(batch: pa.RecordBatch, column: str) -> Tensor:
    """int64 [n], copied: Arrow's memory is read-only, which torch warns about."""
    return torch.from_numpy(batch.column(column).to_numpy().copy())


def _matrix(lists: pa.Array) -> Tensor:
    return torch.from_numpy(lists.flatten().to_numpy().reshape(len(lists), lists.type.list_size).copy())
