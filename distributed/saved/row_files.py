"""Store rows of dynamic tables as parquet files by id: any number of ranks can load what any number has saved.

A rank writes one file per table. In it rows lie by bucket, mix64(id) modulo a number that many numbers of ranks divide,
each bucket in row groups of its own; so a rank reads only the row groups that can hold rows it owns.
docs/checkpoints.md describes the columns for other readers.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tessera.distributed.rank import Process
from tessera.distributed.saved.checked_parquet import CheckedParquet, Notes, as_rows
from tessera.distributed.saved.manifest import CheckpointError
from tessera.distributed.saved.storage import Storage
from tessera.embedding.decay import decayed_rows, kept
from tessera.embedding.errors import TesseraError
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.set_table import OwnedTable
from tessera.kernels.message import owner_of
from tessera.kernels.mix import mix64

Columns = dict[str, Tensor]
T = TypeVar("T")

BUCKETS = (1, 12, 120, 960)  # divided by 1 to 6, 8, 10, 12, 15, 16, 20, 24, 32, 64 … ranks
ROWS, PENDING, EVICTED = "rows", "waiting", "gone"  # folders: of rows, of ids pending admission, of evicted ids
BUCKET_ROWS = 1 << 13  # rows of a bucket, at least, unless there is only one bucket
GROUP_ROWS = 1 << 15  # rows of a row group, at most: a few stay in the processor's cache on their way
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
DTYPES |= {"float64": torch.float64}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in (torch.int64, torch.uint8, torch.int8)}
COLUMN_OF_FIELD = {"ids": "id", "rows": "row", "scale": "step_size"}  # of RowBatch; others are called as the fields


@dataclass(frozen=True)
class ColumnSource:
    """Source of rows for a file: `ids()` gives int64 [n], then `read(positions)` the columns of some of them, each
    once; `close()` when nobody reads any more."""

    ids: Callable[[], Tensor]
    read: Callable[[Tensor], Columns]
    close: Callable[[], None] = lambda: None


def columns_of(batch: RowBatch) -> Columns:
    """Return the tensors of a batch by the names of their columns, on the host."""
    named = {COLUMN_OF_FIELD.get(field.name, field.name): getattr(batch, field.name) for field in fields(RowBatch)}
    return {name: tensor.cpu() for name, tensor in named.items() if tensor is not None}


def rows_of(table: OwnedTable, leave_out: tuple[str, ...] = (), since: int | None = None) -> ColumnSource:
    """Return a source of all rows of a table as they are now, or of those touched since a mark. Another thread may
    write them while the table changes."""
    snapshot, rows = table.snapshot(), torch.empty(0, dtype=torch.int64)

    def ids() -> Tensor:
        nonlocal rows
        rows, found = snapshot.rows_in_use(since)
        return found

    def read(positions: Tensor) -> Columns:
        columns = columns_of(snapshot.read(rows[positions]))
        return {name: column for name, column in columns.items() if name not in leave_out}

    return ColumnSource(ids, read, snapshot.release)


def copied(columns: Columns) -> ColumnSource:
    """Return a source of columns that nobody changes any more, one of them `id`."""
    return ColumnSource(
        lambda: columns["id"], lambda rows: {name: one.index_select(0, rows) for name, one in columns.items()}
    )


def folder_name(table: str) -> str:
    """Return the name of a table's folder: quoted as in a URL, with dots quoted where there is nothing else, as a
    folder may not be called `..`; % for a table without a name."""
    quoted = quote(table, safe="")
    return quoted if quoted.strip(".") else quoted.replace(".", "%2E") or "%"


def file_name(kind: str, table: str, rank: int, ranks: int) -> str:
    """Return the path of a rank's file. kind: one of ROWS, PENDING, EVICTED."""
    return f"{kind}/{folder_name(table)}/{rank:05d}-of-{ranks:05d}.parquet"


def write_columns(storage: Storage, path: str, source: ColumnSource, ranks: int) -> None:
    """Write rows by bucket. Columns are int64, or fixed-size binary: the bytes of a matrix's row."""
    ids = source.ids()
    buckets = max(b for b in BUCKETS if b == 1 or ids.numel() * ranks >= b * BUCKET_ROWS)
    bucket = np.empty(ids.numel(), np.uint16)  # numpy sorts 16 bits by counting
    for begin in range(0, ids.numel(), GROUP_ROWS):
        mixed = mix64(ids[begin : begin + GROUP_ROWS]).numpy().view(np.uint64)  # as `owner_of`
        bucket[begin : begin + GROUP_ROWS] = mixed % np.uint64(buckets)
    order = torch.from_numpy(bucket.argsort(kind="stable"))
    ends = np.bincount(bucket, minlength=buckets).cumsum().tolist()
    schema = _schema(source.read(order[:0]), buckets)
    spans = [(number, order[begin:end]) for number, begin, end in _spans(ends)]
    with (
        storage.write(path) as stream,
        pq.ParquetWriter(stream, schema, compression="NONE", use_dictionary=False, write_statistics=False) as writer,
    ):
        notes = Notes(stream)
        for columns in read_ahead(partial(source.read, positions) for _, positions in spans):
            arrays = [_to_arrow(columns[name], schema.field(name).type) for name in schema.names]
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=GROUP_ROWS)
            notes.add()
        group_buckets = json.dumps([number for number, _ in spans])
        writer.add_key_value_metadata({"tessera.bucket_of_row_group": group_buckets, **notes.metadata()})


def read_ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield the results of the calls, in order. A thread runs the next two while the caller works on one: two, because
    with one a large row group between small ones would stall the caller."""
    with ThreadPoolExecutor(1, "rows ahead") as thread:
        pending: deque[Future[T]] = deque()
        for call in calls:
            pending.append(thread.submit(call))
            if len(pending) > 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _spans(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (bucket, begin, end) of row groups, equal parts of their bucket. ends: the end of each bucket."""
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        groups = -(-(end - begin) // GROUP_ROWS)
        for group in range(groups):
            yield (
                number,
                begin + (end - begin) * group // groups,
                begin + (end - begin) * (group + 1) // groups,
            )


def _schema(empty: Columns, buckets: int) -> pa.Schema:
    parts = []
    for name, column in empty.items():
        if column.dim() == 1:
            assert column.dtype == torch.int64, (name, column.dtype)
            parts.append(pa.field(name, pa.int64(), nullable=False))
        elif column.shape[1]:
            dtype = str(column.dtype).removeprefix("torch.")
            shape = {"dtype": dtype, "width": str(column.shape[1])}
            binary = pa.binary(column.shape[1] * column.element_size())
            parts.append(pa.field(name, binary, nullable=False, metadata=shape))
    return pa.schema(parts, metadata={"tessera.buckets": str(buckets)})


def _to_arrow(column: Tensor, kind: pa.DataType) -> pa.Array:
    if column.dim() == 1:
        return pa.array(column.numpy())
    data = pa.py_buffer(column.contiguous().view(torch.uint8).numpy())
    return pa.FixedSizeBinaryArray.from_buffers(kind, column.shape[0], [None, data])


def _to_tensor(array: pa.Array, field: pa.Field) -> Tensor:
    """Return a tensor on the array's memory, which it alone refers to."""
    if not pa.types.is_fixed_size_binary(field.type):
        return torch.from_dlpack(array)
    begin, size = array.offset * field.type.byte_width, len(array) * field.type.byte_width
    data = pa.UInt8Array.from_buffers(pa.uint8(), size, [None, array.buffers()[1]], offset=begin)
    dtype = DTYPES[field.metadata[b"dtype"].decode()]
    return torch.from_dlpack(data).view(dtype).view(len(array), int(field.metadata[b"width"]))


def read_columns(storage: Storage, path: str, rank: int, ranks: int) -> Iterator[Columns]:
    """Yield the rows of a file that `rank` of `ranks` owns, one row group at a time; groups without such rows are not
    read.

    Raises DamagedFile: a row group is not what was written (it is looked at before it is believed), or cannot be read.
    """
    with CheckedParquet(storage, path) as file:
        wanted, share = _groups_of(file, rank, ranks)

        def read(group: int) -> Columns:
            with as_rows(storage, path):
                table = file.read(group, once=share == 1).combine_chunks()
                columns = {f.name: _to_tensor(table.column(f.name).chunk(0), f) for f in file.schema}
                if share > 1:
                    mine = (owner_of(mix64(columns["id"]), ranks) == rank).nonzero().flatten()
                    columns = {name: column.index_select(0, mine) for name, column in columns.items()}
            return columns

        yield from read_ahead(partial(read, group) for group in wanted)


def no_rows(storage: Storage, path: str) -> Columns:
    """Return the columns of a file without any of its rows. Raises DamagedFile."""
    with CheckedParquet(storage, path) as file, file.as_rows():
        arrays = {field.name: (pa.array([], field.type), field) for field in file.schema}
        return {name: _to_tensor(array, field) for name, (array, field) in arrays.items()}


def count_rows(storage: Storage, path: str, rank: int, ranks: int) -> int:
    """Return the number of rows of a file that `rank` of `ranks` owns; an estimate if buckets alone do not decide."""
    with CheckedParquet(storage, path) as file:
        wanted, share = _groups_of(file, rank, ranks)
        with file.as_rows():
            return sum(int(file.metadata.row_group(group).num_rows) for group in wanted) // share


def _groups_of(file: CheckedParquet, rank: int, ranks: int) -> tuple[list[int], int]:
    """Return the row groups that may hold rows of `rank` of `ranks`, and the number of ranks that share each."""
    with file.as_rows():
        about = file.metadata.metadata
        common = math.gcd(int(about[b"tessera.buckets"]), ranks)
        of_group = json.loads(about[b"tessera.bucket_of_row_group"])
        if not isinstance(of_group, list) or len(of_group) != file.metadata.num_row_groups:
            raise ValueError(f"buckets of row groups: found {len(of_group)}, expected {file.metadata.num_row_groups}")
        return [group for group, bucket in enumerate(of_group) if bucket % common == rank % common], ranks // common


def files_of(storage: Storage, kind: str, table: str, process: Process) -> list[str]:
    """Return the files of a table that may hold rows of this rank. Empty if there is no such table.

    storage: as its manifest lists it (`SavedFolder`), so that files of other saves are not among them.

    Raises CheckpointError: they are not one file of each rank of one save.
    """
    folder = f"{kind}/{folder_name(table)}"
    names = storage.names(folder)
    if names != [file_name(kind, table, rank, len(names)).rpartition("/")[2] for rank in range(len(names))]:
        raise CheckpointError(f"{storage.name}/{folder} holds {', '.join(names)}; expected one file of each rank")
    common = math.gcd(len(names), process.world_size)
    return [f"{folder}/{name}" for rank, name in enumerate(names) if rank % common == process.rank % common]


def empty_columns(table: OwnedTable) -> Columns:
    """Return the columns of the table without any rows."""
    return columns_of(table.read_rows(torch.empty(0, dtype=torch.int64, device=table.device)))


def to_batch(
    columns: Columns,
    expected: Columns,
    table: OwnedTable,
    path: str,
    *,
    with_state: bool,
    with_rows: bool,
    with_periods: bool = True,
    decayed: float = 0.0,
) -> RowBatch:
    """Convert columns of a file to the batch that `import_rows` takes. Optimizer state that the file lacks, or that is
    not wanted, is a new row's; rows whose period it lacks, or is not wanted, are older than any period of the table.
    Rows that say how far they are decayed are decayed here for a table that does not note it in the same way.

    expected: the table's `empty_columns`. decayed: sum of the decay of the table that was saved, at that moment.

    Raises:
        TesseraError: a column has another type or width than the table.
    """
    if not with_state or "state" not in columns:
        first = table.config.optimizer.initial_accumulator
        columns = {**columns, "state": torch.full((columns["id"].numel(), expected["state"].shape[1]), first)}
    noted = columns.get("decay")
    same_decay = noted is not None and "decay" in expected and noted.shape == (len(noted), expected["decay"].shape[1])
    parts: dict[str, Any] = {}  # tensors, and None where a field may lack
    for field in fields(RowBatch):
        name = COLUMN_OF_FIELD.get(field.name, field.name)
        absent = name == "period" and not (with_periods and name in columns) or name == "decay" and not same_decay
        if name == "row" and not with_rows or name not in expected or absent:
            parts[field.name] = None
            continue
        wanted = expected[name]
        column = columns.get(name)
        if column is None and wanted.dim() == 2 and not wanted.shape[1]:  # files have no columns without bytes
            column = wanted.new_empty((columns["id"].numel(), 0))
        if column is None or column.dtype != wanted.dtype or column.shape[1:] != wanted.shape[1:]:
            raise TesseraError(f"{path}: column {name} holds {_kind(column)}; the model's table has {_kind(wanted)}")
        parts[field.name] = column.to(table.device)
    batch = RowBatch(**parts)
    if noted is None or same_decay:
        return batch
    return decayed_rows(batch, table.config, kept(noted, decayed).to(table.device))


def _kind(column: Tensor | None) -> str:
    if column is None:
        return "nothing"
    width = f"{column.shape[1]} x " if column.dim() == 2 else ""
    return width + str(column.dtype).removeprefix("torch.")
