"""Read items and their vectors from parquet files, some thousand rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from tessera.ctr.data import columns
from tessera.ctr.data.arrow_types import plain_type
from tessera.ctr.data.counter_random import key, mix64
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.files import DataFile, one_line
from tessera.ctr.data.footers import is_list, is_number, is_text, is_whole, value_type
from tessera.ctr.data.listing import list_files
from tessera.ctr.data.schema import nearest

BATCH_ROWS = 16384


@dataclass(frozen=True)
class Items:
    """Items of one file. keys: 64 bits of each, int64 [n], as the reader has them of an id column."""

    array: pa.Array
    keys: np.ndarray
    x: np.ndarray  # float32 [n, dim]; of width 0 where vectors are not read


class Vectors:
    """Parquet files with a column of items and one of vectors.

    Raises DataError (files, rows) and SchemaError (columns).
    """

    def __init__(self, paths: Sequence[str], item: str, vector: str) -> None:
        self.files = list_files(list(paths)).files
        self.item, self.vector = item, vector
        self.dim: int | None = None
        self.item_type = _types_of(self.files, item, vector)

    def batches(self, *, vectors: bool = True) -> Iterator[Items]:
        """Yield all items in the order of the files."""
        wanted = [self.item, self.vector] if vectors else [self.item]
        for file in self.files:
            row = 0
            try:
                with file.open() as parquet:
                    for batch in parquet.iter_batches(BATCH_ROWS, columns=wanted):
                        yield self._items(batch, f"{file.path}, row {{}}: column", row)
                        row += len(batch)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file.path}: cannot be read: {one_line(error)}") from None

    def sample(self, most: int, seed: int) -> np.ndarray:
        """Return the vectors float32 [n, dim] of the `most` items with the smallest hash of seed and item, in its
        order: a random choice that depends on neither the order of files nor their cut."""
        chosen: np.ndarray = np.zeros((0, 0), np.float32)
        hashes: np.ndarray = np.zeros(0, np.uint64)
        for batch in self.batches():
            if not len(batch.keys):
                continue
            fresh = mix64(batch.keys.view(np.uint64) ^ key(seed))
            low = np.flatnonzero(fresh < hashes.max()) if len(hashes) >= most else np.arange(len(fresh))
            chosen = np.concatenate([chosen.reshape(-1, batch.x.shape[1]), batch.x[low]])
            hashes = np.concatenate([hashes, fresh[low]])
            if len(hashes) > most:
                kept = np.argpartition(hashes, most - 1)[:most]
                chosen, hashes = chosen[kept], hashes[kept]
        if not len(hashes):
            raise DataError(f"{self.files[0].path}: no rows found, expected items with vectors")
        return chosen[np.argsort(hashes, kind="stable")]

    def named_twice(self, wanted: int) -> str:
        """Return the message for a key that two rows have."""
        for batch in self.batches(vectors=False):
            at = np.flatnonzero(batch.keys == wanted)
            if len(at):
                return f"column {self.item!r}: item {batch.array[int(at[0])].as_py()!r} found twice, expected once"
        raise AssertionError(wanted)

    def _items(self, batch: pa.RecordBatch, where: str, row: int) -> Items:
        items = columns.plain(batch.column(self.item))
        found = items_keys(items)
        if items.null_count:
            at = row + int(np.flatnonzero(items.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{where.format(at)} {self.item!r} found null, expected an item")
        if self.vector not in batch.schema.names:
            return Items(items, found, np.zeros((len(items), 0), np.float32))
        return Items(items, found, self._vectors(columns.plain(batch.column(self.vector)), where, row))

    def _vectors(self, array: pa.Array, where: str, row: int) -> np.ndarray:
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        if self.dim is None and len(lengths):
            self.dim = int(lengths[0])
        wrong = np.flatnonzero((lengths != self.dim) | (lengths == 0))
        if len(wrong):
            at, expected = int(wrong[0]), f"{self.dim or 'some'} numbers, as the first vector has"
            raise DataError(
                f"{where.format(row + at)} {self.vector!r} found {lengths[at]} numbers, expected {expected}"
            )
        values = pc.fill_null(array.flatten().cast(pa.float32(), safe=False), np.nan).to_numpy(zero_copy_only=False)
        x = values.reshape(len(array), -1) if len(array) else np.zeros((0, self.dim or 0), np.float32)
        bad = np.flatnonzero(~np.isfinite(x).all(1))
        if len(bad):
            at = row + int(bad[0])
            raise DataError(f"{where.format(at)} {self.vector!r} found a value that is null, NaN or infinite")
        return x


def items_keys(items: pa.Array) -> np.ndarray:
    """Return the 64 bits, int64 [n], that the reader gives an id column of integers or strings; arbitrary where null.
    items: of a plain type."""
    found, _, _ = columns.ids(items, "string")
    return np.ascontiguousarray(found.astype(np.int64))


def item_kind(stored: pa.DataType, where: str) -> str:
    """Return "integer" or "text". Raises SchemaError for columns that hold neither."""
    kind = value_type(plain_type(stored))
    if not (is_whole(kind) or is_text(kind)):
        raise SchemaError(f"{where} is {stored}, expected integers or strings")
    return "text" if is_text(kind) else "integer"


def _types_of(files: Sequence[DataFile], item: str, vector: str) -> pa.DataType:
    first: pa.DataType | None = None
    for file in files:
        try:
            with file.open() as parquet:
                schema = parquet.schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file.path}: cannot be read: {one_line(error)}") from None
        for name in (item, vector):
            if name not in schema.names:
                raise SchemaError(f"{file.path}: column {name!r} not found; {nearest(name, schema.names)}")
        stored, found = plain_type(schema.field(item).type), plain_type(schema.field(vector).type)
        item_kind(stored, f"{file.path}: column {item!r}")
        listed = is_list(found) or types.is_fixed_size_list(found)
        if not listed or not is_number(found.value_type):
            raise SchemaError(f"{file.path}: column {vector!r} is {found}, expected lists of numbers")
        stored = stored.value_type if types.is_dictionary(stored) else stored
        if first is not None and stored != first:
            raise SchemaError(f"{file.path}: column {item!r} is {stored}, expected {first}, as in {files[0].path}")
        first = stored
    assert first is not None
    return first
