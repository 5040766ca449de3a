"""Read the footers of a data set's files: row groups, and whether every file agrees with the schema."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from tessera.ctr.data.arrow_types import advice, plain_type
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.expressions import Expression, check_filter, stored_types
from tessera.ctr.data.files import DataFile, one_line
from tessera.ctr.data.row_group_filter import is_outside
from tessera.ctr.data.schema import Feature, Schema, length_of, nearest
from tessera.ctr.data.seals import SMALL_BYTES, TAIL_BYTES, read_seal
from tessera.ctr.data.times import times_of

CONTENTS = 1024  # checksums in a reader's state, at most
WHOLE_BYTES = 256 << 20  # of small files that are read whole for their seals; with more of them fewer are small
LABEL_READS = 256  # over a network, of labels for the seals of large files; with more files than that there are none
THREADS = 16  # footers are small reads that wait for storage, not for the processor


@dataclass(frozen=True)
class RowGroups:
    """All row groups of a data set, in the order of the files' names."""

    files: list[DataFile]
    file: np.ndarray  # int64 [groups], index into files
    index: np.ndarray  # int64 [groups], number inside the file
    rows: np.ndarray  # int64 [groups]
    bytes: np.ndarray  # int64 [groups], decoded size of the schema's columns as the footer estimates it
    dictionaries: list[str]  # text columns whose dictionaries are small beside their data
    seals: list[str]  # of each file, what tells it from another one of its name and rows (seals.py)
    unsigned: frozenset[str] = frozenset()  # columns whose integers, or those of their lists, are uint64
    times: np.ndarray | None = None  # int64 [groups, 2], smallest and largest time (seconds); (1, 0) where not known
    outside: np.ndarray | None = None  # bool [groups]: no row passes `data.where`; None without one
    weight: np.ndarray | None = None  # float32 [groups], on the weights of their rows; None: 1 each

    @property
    def fingerprint(self) -> str:
        """Hash of the files' names below the data set's root and of the row counts of each row group."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.name.encode() + b"\0")
        for numbers in (self.file, self.index, self.rows):
            digest.update(numbers.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    @property
    def contents(self) -> list[str]:
        """Checksums of the files' seals, 8 hex digits for each, or for several neighbours where there are many."""
        seals = [
            self.seals[first : first + self.files_of_one] for first in range(0, len(self.files), self.files_of_one)
        ]
        return [hashlib.sha256("".join(some).encode()).hexdigest()[:8] for some in seals]

    @property
    def files_of_one(self) -> int:
        """Number of neighbouring files that share one checksum in `contents`."""
        return -(-len(self.files) // CONTENTS)

    @property
    def first(self) -> np.ndarray:
        """int64 [groups]: number of each group's first row, with the rows of all groups numbered in order."""
        return np.cumsum(self.rows) - self.rows

    def where(self, group: int) -> str:
        return f"{self.files[self.file[group]].path} row group {self.index[group]}"


def read_footers(
    files: list[DataFile], schema: Schema, *, drop_labels: bool = False, where: Expression | None = None
) -> RowGroups:
    """Read every footer and compare it with the schema.

    Raises SchemaError for the first file that disagrees, DataError for one that is no parquet file or when
    there are no rows at all.
    """
    wanted = wanted_columns(schema, drop_labels=drop_labels)
    small_bytes = min(SMALL_BYTES, max(TAIL_BYTES, WHOLE_BYTES // len(files)))
    sealed_groups = min(4, LABEL_READS // len(files)) if files[0].remote else 4
    with ThreadPoolExecutor(min(THREADS, len(files)), "footer") as pool:
        footers = list(
            pool.map(lambda file: _read_footer(file, wanted, small_bytes, sealed_groups, schema, where), files)
        )
    _refuse_mixed_groups(files, [footer.group_is_text for footer in footers], schema.group)
    numbers = [np.concatenate([getattr(footer, key) for footer in footers]) for key in ("rows", "bytes")]
    groups = [len(footer.rows) for footer in footers]
    if not numbers[0].sum():
        raise DataError(f"{files[0].path} and the other {len(files) - 1} files: found 0 rows, expected some")
    small = [footer.small_dictionaries for footer in footers if len(footer.rows)]
    return RowGroups(
        files=files,
        file=np.repeat(np.arange(len(files)), groups),
        index=np.concatenate([np.arange(n) for n in groups]),
        rows=numbers[0],
        bytes=numbers[1],
        dictionaries=sorted(set.intersection(*small)),
        seals=[footer.seal for footer in footers],
        unsigned=frozenset(set.intersection(*(footer.unsigned for footer in footers))),
        times=np.concatenate([footer.times for footer in footers]) if schema.times else None,
        outside=None if where is None else np.array([one for footer in footers for one in footer.outside], bool),
    )


@dataclass(frozen=True)
class _Footer:
    seal: str
    rows: np.ndarray  # of each row group
    bytes: np.ndarray
    small_dictionaries: set[str]
    group_is_text: bool | None
    unsigned: set[str]
    outside: list[bool]  # of each row group, where there is a filter
    times: np.ndarray | None


@dataclass(frozen=True)
class Wanted:
    """A column that the schema reads: who reads it, which types do, and how to say so."""

    column: str
    reader: str
    accepts: Callable[[pa.DataType], bool]
    expected: str


def _read_footer(
    file: DataFile,
    wanted: list[Wanted],
    small_bytes: int,
    groups: int,
    schema: Schema,
    where: Expression | None,
) -> _Footer:
    labels = {want.column for want in wanted if want.reader == "labels"}
    sealed = read_seal(file, small_bytes, labels, groups)
    metadata, arrow = sealed.metadata, sealed.schema
    for want in wanted:
        check_column(file.path, arrow, want)
    _refuse_nulls_of_fixed_size(file.path, metadata, arrow, wanted)
    check_expressions(file.path, arrow, schema)
    if where is not None:
        check_filter(where, file.path, arrow)
    columns = {want.column for want in wanted}
    leaves = [i for i in range(metadata.num_columns) if _top(metadata, i, columns)]
    row_groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    group = next((want.column for want in wanted if want.reader == "group"), None)
    return _Footer(
        seal=f"{sealed.size} {sealed.checksum} ",
        rows=np.array([g.num_rows for g in row_groups], np.int64),
        bytes=np.array([sum(g.column(i).total_uncompressed_size for i in leaves) for g in row_groups], np.int64),
        small_dictionaries=_small_dictionaries(row_groups[0], leaves, arrow) if row_groups else set(),
        group_is_text=None if group is None else is_text(value_type(plain_type(arrow.field(group).type))),
        unsigned={field.name for field in arrow if field.name in columns and is_unsigned(field.type)},
        outside=[] if where is None else [is_outside(where, g) for g in row_groups],
        times=None if schema.times is None else times_of(metadata, schema.times),
    )


def _top(metadata: pq.FileMetaData, leaf: int, columns: set[str]) -> bool:
    path = metadata.schema.column(leaf).path
    return path in columns or path.split(".")[0] in columns


def check_expressions(where: str, arrow: pa.Schema, schema: Schema) -> None:
    """Raise SchemaError for features whose expressions cannot be computed of the columns, or give another type than the
    feature reads. where: the begin of a message. Those whose columns are not all there are passed over."""
    for feature in schema.stored:
        expression = feature.expression
        if expression is None or not set(expression.columns) <= set(arrow.names):
            continue
        what = f"{where}: feature {feature.name!r}: {expression.text}"
        try:
            found = expression.type_of(stored_types(expression, arrow))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise SchemaError(f"{what}: {one_line(error)[:200]}") from None
        accepts, expected = _value_of(feature)
        if not accepts(found):
            hint = "; integer(..) rounds down" if types.is_floating(found) else ""
            raise SchemaError(f"{what}: found {found}, expected {expected}{hint}")


def _computes(found: pa.DataType) -> bool:
    found = value_type(found)
    return (
        is_number(found) or is_text(found) or types.is_null(found) or types.is_timestamp(found) or types.is_date(found)
    )


def _value_of(feature: Feature) -> tuple[Callable[[pa.DataType], bool], str]:
    """Return which types the one value of a row may have."""
    if feature.kind == "numeric":
        return _or_null(is_number), "a number"
    accepts, item = (is_whole, "an integer") if feature.dtype == "int" else (is_text, "a string")
    return _or_null(accepts), f"{item} (dtype: {feature.dtype})"


def _refuse_nulls_of_fixed_size(path: str, metadata: pq.FileMetaData, arrow: pa.Schema, wanted: list[Wanted]) -> None:
    """Raise SchemaError for lists of a fixed size with nulls among them: Arrow writes and cannot read them again."""
    fixed = {want.column: want for want in wanted if types.is_fixed_size_list(arrow.field(want.column).type)}
    if not fixed:
        return
    leaves = {i: fixed.get(metadata.schema.column(i).path.split(".")[0]) for i in range(metadata.num_columns)}
    for i, want in leaves.items():
        groups = (metadata.row_group(g).column(i).statistics for g in range(metadata.num_row_groups))
        if want is not None and any(one is not None and one.has_null_count and one.null_count for one in groups):
            stored = arrow.field(want.column).type
            raise SchemaError(
                f"{path}: column {want.column!r} (read by {want.reader}) found nulls in {stored}, which Arrow "
                f"writes and cannot read from parquet; write it as list<{stored.value_type}>"
            )


def check_column(where: str, arrow: pa.Schema, want: Wanted) -> None:
    """Compare a column with what reads it. where: the begin of a message, as the file's path.

    Raises SchemaError: it is not there once, or has another type.
    """
    places = arrow.get_all_field_indices(want.column)
    if len(places) != 1:
        found = f"{len(places)} times" if places else f"nowhere; {nearest(want.column, arrow.names)}"
        raise SchemaError(f"{where}: column {want.column!r} (read by {want.reader}) found {found}")
    stored = arrow.field(places[0]).type
    found = plain_type(stored)
    if not want.accepts(found):
        hint = ""
        if types.is_floating(found) and want.reader.startswith("feature"):
            hint = "; integers with missing values must be stored as nullable integers, not as floats"
        raise SchemaError(
            f"{where}: column {want.column!r} (read by {want.reader}) found {stored}, expected {want.expected}"
            f"{hint or advice(found)}"
        )


def _small_dictionaries(group: pq.RowGroupMetaData, leaves: list[int], arrow: pa.Schema) -> set[str]:
    """Return plain text columns that are quicker to decode as dictionary and codes than as one string per row.

    Measured on 8-byte strings: with a dictionary page up to about half of the column's bytes this wins (one
    hash per dictionary entry), with a larger one plain decoding does.
    """
    names = set()
    for leaf in leaves:
        chunk = group.column(leaf)
        field = arrow.get_field_index(chunk.path_in_schema)
        if field >= 0 and is_text(arrow.field(field).type) and chunk.has_dictionary_page:
            dictionary = chunk.data_page_offset - chunk.dictionary_page_offset
            if dictionary * 2 < chunk.total_compressed_size:
                names.add(chunk.path_in_schema)
    return names


def _refuse_mixed_groups(files: list[DataFile], is_text: list[bool | None], column: str | None) -> None:
    for file, text in zip(files, is_text, strict=True):
        if text != is_text[0]:
            kinds = ("an integer", "a string")
            raise SchemaError(
                f"{file.path}: column {column!r} (read by group) found {kinds[bool(text)]}, "
                f"expected {kinds[bool(is_text[0])]} as in {files[0].path}"
            )


def value_type(found: pa.DataType) -> pa.DataType:
    return found.value_type if types.is_dictionary(found) else found


def is_text(found: pa.DataType) -> bool:
    return (
        types.is_string(found) or types.is_large_string(found) or types.is_binary(found) or types.is_large_binary(found)
    )


def is_list(found: pa.DataType) -> bool:
    return types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)


def is_whole(found: pa.DataType) -> bool:
    decimal = types.is_decimal(found) and found.scale == 0  # as databases write what does not fit their integers
    return types.is_integer(found) or types.is_boolean(found) or decimal


def is_unsigned(found: pa.DataType) -> bool:
    found = plain_type(found)
    return types.is_uint64(found.value_type if is_list(found) else value_type(found))


def is_number(found: pa.DataType) -> bool:
    return is_whole(found) or types.is_floating(found) or types.is_decimal(found)


def is_time(found: pa.DataType) -> bool:
    return types.is_integer(found) or types.is_timestamp(found) or types.is_date(found)


def _or_null(accepts: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    # A column without a single value is often written with the type null; it reads as all missing.
    return lambda found: types.is_null(value_type(found)) or accepts(value_type(found))


def _listed(accepts: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    return _or_null(lambda found: is_list(found) and _or_null(accepts)(found.value_type))


def _vector_of(length: int) -> tuple[Callable[[pa.DataType], bool], str]:
    """Return which types hold vectors of a length, and what to call them. Lists of no fixed size are looked at row by
    row."""

    def fits(found: pa.DataType) -> bool:
        found = value_type(found)
        return not types.is_fixed_size_list(found) or found.list_size == length

    listed = _listed(is_number)
    return lambda found: listed(found) and fits(found), f"a list of {length:,} numbers (length: {length})"


def wanted_columns(schema: Schema, *, drop_labels: bool) -> list[Wanted]:
    """Return the columns that a schema reads; one that two features read stands there twice."""
    wanted = []
    if not drop_labels:
        for task in schema.tasks:
            accepts = _or_null(is_number) if task.nulls == "unknown" else is_number
            wanted.append(Wanted(task.column, "labels", accepts, "a number" + ", 0 or 1" * (not task.is_number)))
    if schema.weight:
        wanted.append(Wanted(schema.weight, "weight", is_number, "a number"))
    if schema.group:
        accepts = lambda found: is_whole(value_type(found)) or is_text(value_type(found))  # noqa: E731
        wanted.append(Wanted(schema.group, "group", accepts, "an integer or a string"))
    if schema.time:
        expected = "integers since 1970 (data.schema.time_unit), a timestamp or a date"
        wanted.append(Wanted(schema.time, "time", is_time, expected))
    for feature in schema.stored:
        wanted += _wanted_by(feature)
    return wanted


def _wanted_by(feature: Feature) -> list[Wanted]:
    reader = f"feature {feature.name!r}"
    if feature.expression:
        expected = "numbers, text or times, which an expression computes with"
        return [Wanted(name, reader, _computes, expected) for name in feature.columns]
    if feature.kind == "numeric":
        return [Wanted(feature.column, reader, _or_null(is_number), "a number")]
    if feature.kind == "vector":
        accepts, expected = _vector_of(length_of(feature))
        return [Wanted(feature.column, reader, accepts, expected)]
    if feature.dtype == "float":
        return [Wanted(feature.column, reader, _listed(is_number), "a list of numbers (dtype: float)")]
    if feature.delimiter is not None:
        expected = f"a string of items between {feature.delimiter!r}"
        return [Wanted(feature.column, reader, _or_null(is_text), expected)]
    accepts, item = (is_whole, "an integer") if feature.dtype == "int" else (is_text, "a string")
    expected = f"{item} (dtype: {feature.dtype})"
    if feature.kind == "id":
        return [Wanted(feature.column, reader, _or_null(accepts), expected)]
    wanted = [Wanted(feature.column, reader, _listed(accepts), f"a list, each item {expected}")]
    if feature.weights:
        reader = f"{reader} as weights"
        wanted.append(Wanted(feature.weights, reader, _listed(is_number), "a list of numbers"))
    return wanted
