"""Vocabularies: the ids that may have a row, by how often they occur in a data set or by what a search has kept.

A vocabulary is a folder with a parquet file for each column, or a folder of files for each table, and
`vocabulary.json`, which lists them. Files of columns hold values as the data have them and their counts, so every
feature that reads the column decodes them as it decodes its rows. Files of tables hold ids of 64 bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from tessera.ctr.data import columns
from tessera.ctr.data.arrow_types import plain_type
from tessera.ctr.data.bags import as_lists, item_values, items_of, lengths_of
from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.features import Feature, nearest
from tessera.ctr.data.files import one_line
from tessera.ctr.data.footers import is_list, is_text, is_whole, value_type
from tessera.distributed.atomic import write_text
from tessera.distributed.saved.row_files import folder_name

LISTED = "vocabulary.json"
VERSION = 1
OF_COLUMNS, OF_TABLES = "columns", "tables"
PENDING = 1 << 20  # least number of counts that are merged at a time


def holds_ids(stored: pa.DataType) -> bool:
    """Return whether a column of this type holds whole numbers or text, or lists of them."""
    kind = plain_type(stored)
    item = value_type(kind.value_type if is_list(kind) else kind)
    return is_text(item) or is_whole(item)


class ValueCounts:
    """How often each value of a column occurs, those of lists one by one. Exact: it holds all distinct values."""

    def __init__(self) -> None:
        self._merged: pa.Table | None = None
        self._pending: list[pa.Table] = []
        self._rows = 0

    def add(self, array: pa.Array) -> None:
        """Add the next rows."""
        array = columns.plain(array)
        if types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if is_list(array.type):
            array = columns.plain(array.flatten())
            array = array.dictionary_decode() if types.is_dictionary(array.type) else array
        values, counts = pc.value_counts(array.drop_null()).flatten()
        self._pending.append(pa.table({"value": values, "count": counts}))
        self._rows += len(values)
        if self._rows >= max(PENDING, 0 if self._merged is None else len(self._merged)):
            self._merge()

    def _merge(self) -> None:
        parts = [*([] if self._merged is None else [self._merged]), *self._pending]
        whole = pa.concat_tables(parts, promote_options="permissive").group_by("value").aggregate([("count", "sum")])
        self._merged = pa.table({"value": whole["value"], "count": whole["count_sum"]})
        self._pending, self._rows = [], 0

    def table(self, at_least: int = 1) -> pa.Table:
        """Return the values that occur so often, ascending, and their counts (int64)."""
        self._merge()
        assert self._merged is not None
        return self._merged.filter(pc.greater_equal(self._merged["count"], at_least)).sort_by("value")


def write_of_columns(folder: Path, counted: Mapping[str, ValueCounts], at_least: int) -> dict[str, int]:
    """Write a vocabulary of columns, with the values that occur at least so often. Returns their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, counts in counted.items():
        table = counts.table(at_least)
        pq.write_table(table, folder / f"{folder_name(name)}.parquet")
        found[name] = len(table)
    write_text(folder / LISTED, _listed(OF_COLUMNS, at_least, found))
    return found


def write_ids_of_table(folder: Path, table: str, rank: int, ids: np.ndarray) -> None:
    """Write this rank's ids of a table, int64 [n], to a vocabulary of tables."""
    place = folder / folder_name(table)
    place.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": np.sort(ids)}), place / f"{rank:05d}.parquet")


def list_tables(folder: Path, found: Mapping[str, int]) -> None:
    """Complete a vocabulary of tables: found is the number of ids of each, of all ranks."""
    write_text(folder / LISTED, _listed(OF_TABLES, 1, found))


def _listed(of: str, at_least: int, found: Mapping[str, int]) -> str:
    return json.dumps({"version": VERSION, "of": of, "at_least": at_least, "ids": dict(found)}, indent=1) + "\n"


class Vocabulary:
    """A vocabulary that was written, to be read table by table.

    Raises SchemaError: the folder holds none.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        where = f"embedding.admission.vocabulary: {folder}"
        try:
            listed: dict[str, Any] = json.loads((self.folder / LISTED).read_text())
            self.of, self.at_least, self.names = listed["of"], int(listed["at_least"]), list(listed["ids"])
        except OSError as error:
            raise SchemaError(f"{where} cannot be read: {one_line(error)}") from None
        except (ValueError, KeyError, TypeError):
            raise SchemaError(f"{where}/{LISTED} is no list of a vocabulary of `tessera prepare stats`") from None

    def ids_of(self, table: str, features: Sequence[Feature], threshold: int) -> np.ndarray:
        """Return the ids of a table that occur at least `threshold` times, int64 [n], ascending: of all columns that
        its features read together, and with what stands for null and the buckets of numbers.

        Raises SchemaError: nothing is known of the table, or too little for this threshold.
        """
        where = f"embedding.admission: table {table!r}"
        if self.of == OF_TABLES:
            if threshold != 1:
                raise SchemaError(f"{where}: threshold {threshold}, expected 1: {self.folder} has ids without counts")
            return self._read_table(where, table)
        if threshold < self.at_least:
            raise SchemaError(
                f"{where}: threshold {threshold}, expected at least {self.at_least}: {self.folder} has no values that "
                f"occur less often; write it with --min-count {threshold}"
            )
        known = [_known_beforehand(feature) for feature in features]
        columns_read = {(f.column, f.dtype, f.delimiter): f for f in features if f.transform != "bucketise"}
        parts = [self._counted(where, feature) for feature in columns_read.values()]
        if parts:
            ids, place = np.unique(np.concatenate([ids for ids, _ in parts]), return_inverse=True)
            often = np.bincount(place, np.concatenate([counts for _, counts in parts]), len(ids)) >= threshold
            known.append(ids[often])
        return np.unique(np.concatenate(known))

    def _read_table(self, where: str, table: str) -> np.ndarray:
        if table not in self.names:
            raise SchemaError(f"{where}: {self.folder} has no such table; {nearest(table, self.names)}")
        return np.sort(self._read(where, self.folder / folder_name(table))["id"].to_numpy())

    def _counted(self, where: str, feature: Feature) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct ids of a column, and how often they occur."""
        own = "set embedding.tables.<table>.admission.kind to another one"
        if feature.members or feature.expression is not None:
            made = "a cross" if feature.members else "computed by expr"
            raise SchemaError(f"{where}: feature {feature.name!r} is {made}, and vocabularies are of columns; {own}")
        if feature.column not in self.names:
            hint = nearest(feature.column, self.names)
            raise SchemaError(f"{where}: {self.folder} has no column {feature.column!r}; {hint} ({own})")
        table = self._read(where, self.folder / f"{folder_name(feature.column)}.parquet")
        values, counts = table["value"].combine_chunks(), table["count"].to_numpy()
        if feature.delimiter is not None:
            if self.at_least > 1:
                raise SchemaError(
                    f"{where}: feature {feature.name!r} has a delimiter, and {self.folder} has no whole strings that "
                    f"occur less than {self.at_least} times; write it with --min-count 1"
                )
            lists = as_lists(feature, values)
            values, counts = items_of(lists), np.repeat(counts, lengths_of(lists))
        ids, there, well_formed = item_values(feature, columns.plain(values))
        for mask in (there, well_formed):
            counts = counts if mask is None else np.where(mask, counts, 0)
        ids, place = np.unique(ids.astype(np.int64), return_inverse=True)
        return ids, np.bincount(place, counts, len(ids))

    def _read(self, where: str, path: Path) -> pa.Table:
        try:
            return pq.read_table(path, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise SchemaError(f"{where}: {path} cannot be read: {one_line(error)}") from None


def _known_beforehand(feature: Feature) -> np.ndarray:
    """Return the ids of a feature that need no count: all buckets, and what stands for null."""
    buckets = len(feature.boundaries) + 1 if feature.transform == "bucketise" else 0
    missing = [] if feature.missing_id is None else [feature.missing_id]
    return np.array([*range(buckets), *missing], np.int64)
