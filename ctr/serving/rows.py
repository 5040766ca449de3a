"""Turn rows of any common form into what a model reads, by the very code that decodes them for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from tessera.ctr.data import columns, single_values, vectors
from tessera.ctr.data.aligned import decode_aligned
from tessera.ctr.data.bags import BagProblem, Bags, decode_bags, is_bag
from tessera.ctr.data.crosses import Ids, as_bags, crossed
from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.expressions import computed
from tessera.ctr.data.footers import Wanted, check_column, check_expressions, wanted_columns
from tessera.ctr.data.schema import Feature, Schema
from tessera.ctr.serving.errors import RowError

WHERE = "rows"  # so messages call them


@dataclass(frozen=True)
class Rows:
    """Decoded rows. numeric: float32 [n] by name of `Schema.scalar_names`; vectors: float32 [n, length] by name; bags:
    of the id features, and of sequences of numbers, by name; ids: of features that may be crossed, by name."""

    count: int
    numeric: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    bags: dict[str, Bags]
    ids: dict[str, Ids]


class RowDecoder:
    """Decodes rows for one schema. It holds settings only, so threads share one."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._wanted = wanted_columns(schema, drop_labels=True)
        self.columns = sorted({want.column for want in self._wanted})
        self._lists = {f.column for f in schema.stored if f.kind in ("ids", "sequence", "vector") and not f.delimiter}
        self._aligned = {one.name: group for group in schema.sequences.values() for one in group}

    def read_by(self, feature: Feature) -> set[str]:
        """Return the columns that a feature reads, and those that it is aligned with."""
        return {*feature.columns, *(one.column for one in self._aligned.get(feature.name, []))}

    def crossed(self, rows: Rows, user: Rows) -> dict[str, Bags]:
        """Return the crosses of features of rows with those of one user, the row `user`, by name."""
        found = {}
        for feature in self.schema.crosses:
            if feature.name not in rows.bags and feature.name not in user.bags:
                sides = [rows if member.name in rows.ids else user for member in feature.members]
                members = [side.ids[member.name] for side, member in zip(sides, feature.members, strict=True)]
                found[feature.name] = as_bags(crossed(feature, members))
        return found

    def table(self, rows: Any, *, some: bool = False) -> pa.Table:
        """Return rows as an Arrow table with the columns that the model reads.

        rows: an Arrow table or batch, a pandas data frame, a list of dicts, or one dict. some: other rows have the
        columns that lack here.

        Raises RowError: a column is missing, there twice, or of a type that training would not read.
        """
        table = self._as_table(rows, some=some)
        wanted = [want for want in self._wanted if not some or want.column in table.column_names]
        _check(table.schema, wanted, self.schema)
        return table.select(sorted({want.column for want in wanted}))

    def _as_table(self, rows: Any, *, some: bool) -> pa.Table:
        if isinstance(rows, pa.Table):
            return rows
        if isinstance(rows, pa.RecordBatch):
            return pa.Table.from_batches([rows])
        if isinstance(rows, Mapping):
            rows = [rows]
        if isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
            return self._of_dicts(rows, some=some)
        try:
            return pa.Table.from_pandas(rows, preserve_index=False)
        except (AttributeError, ImportError):  # it has not what a data frame has
            expected = "an Arrow table, a pandas data frame, a dict or a list of dicts"
            raise RowError(f"{WHERE} are a {type(rows).__name__}; expected {expected}") from None
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise RowError(f"{WHERE} cannot be read as a table: {one_line(error)}") from None

    def _of_dicts(self, rows: Sequence[Any], *, some: bool) -> pa.Table:
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise RowError(f"row {number} is {_shown(row)}; expected an object with the columns by name")
        arrays = {}
        for name in self.columns:
            there = [name in row for row in rows]
            if some and not any(there):
                continue
            if not all(there):
                number = there.index(False)
                raise RowError(f"row {number} has no column {name!r}; expected a value, or null where it is missing")
            arrays[name] = self._array(name, [row[name] for row in rows])
        if not arrays:
            return pa.table({"": pa.nulls(len(rows))}) if some else pa.table({})
        return pa.table(arrays)

    def _array(self, name: str, values: list[Any]) -> pa.Array:
        """Return a column of Python values. Integers may be of 64 bits with or without sign."""
        if not values and name in self._lists:
            return pa.array([], pa.list_(pa.null()))
        _refuse_nested(name, values)
        problem = ""
        for kind in (None, pa.uint64(), pa.list_(pa.uint64())):
            try:
                return pa.array(values, kind)
            except (OverflowError, pa.ArrowException, TypeError, ValueError) as error:
                problem = problem or one_line(error) or type(error).__name__
        raise RowError(f"column {name!r} cannot be read: {problem}")

    def decode(self, table: pa.Table, first: int = 0) -> Rows:
        """Decode the features whose columns are there; `table` made that. first: number of its first row, for messages.

        Raises RowError: a value is none that training would take; it names the row, the column and what was expected.
        """
        there = set(table.column_names)
        chunks = {name: [columns.plain(chunk) for chunk in table[name].chunks] for name in there}
        for name, parts in chunks.items():
            if not parts:
                chunks[name] = [columns.plain(pa.array([], table.schema.field(name).type))]
        numeric: dict[str, np.ndarray] = {}
        for feature in self.schema.numeric:
            if self.read_by(feature) <= there:
                numeric |= _numeric(feature, _column(feature, chunks), first)
        found: dict[str, np.ndarray] = {}
        for feature in self.schema.vectors:
            if self.read_by(feature) <= there:
                found[feature.name], indicator = _vector(feature, chunks[feature.column], first)
                numeric |= indicator
        categorical = [*self.schema.categorical, *self.schema.only_crossed]
        pooled = [feature for feature in categorical if feature.name not in self._aligned]
        read = [feature for feature in pooled if self.read_by(feature) <= there]
        ids = {feature.name: _ids(feature, chunks, first) for feature in read if not feature.members}
        ids |= {f.name: crossed(f, [ids[member.name] for member in f.members]) for f in read if f.members}
        bags = {f.name: as_bags(ids[f.name]) for f in self.schema.categorical if f.name in ids}
        for group in self.schema.sequences.values():
            if self.read_by(group[0]) <= there:
                decoded, problems = decode_aligned(group, [chunks[feature.column] for feature in group])
                _fail_of(problems, first)
                bags |= {feature.name: one for feature, one in zip(group, decoded, strict=True)}
        return Rows(table.num_rows, numeric, found, bags, ids)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _check(arrow: pa.Schema, wanted: Sequence[Wanted], schema: Schema) -> None:
    try:
        for want in wanted:
            check_column(WHERE, arrow, want)
        check_expressions(WHERE, arrow, schema)
    except SchemaError as error:
        raise RowError(str(error)) from None


def _refuse_nested(name: str, values: list[Any]) -> None:
    """Raise RowError for a value that is more than a list: Arrow would take long to tell what it is."""
    nested = {list, tuple, dict}
    if not nested & set(map(type, values)):
        return
    for number, value in enumerate(values):
        if type(value) is dict or (type(value) in nested and nested & set(map(type, value))):
            raise RowError(f"row {number}: column {name!r} found {_shown(value)}, expected a value or a list of values")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fail(bad: np.ndarray, first: int, column: str, found: object, expected: str) -> NoReturn:
    row = first + int(np.flatnonzero(bad)[0])
    raise RowError(f"row {row}: column {column!r} found {_shown(found)}, expected {expected}")


def _fail_of(problems: Sequence[BagProblem], first: int) -> None:
    for problem in problems:
        _fail(problem.rows, first, problem.column, problem.found, problem.expected)


def _column(feature: Feature, chunks: Mapping[str, list[pa.Array]]) -> list[pa.Array]:
    """Return the column of a feature, or what its expression gives of several."""
    if feature.expression is None:
        return chunks[feature.column]
    try:
        return [computed(feature.expression, [chunks[name] for name in feature.columns])]
    except (pa.ArrowException, TypeError) as error:
        raise RowError(f"{WHERE}: feature {feature.name!r}: {feature.expression.text}: {one_line(error)}") from None


def _numeric(feature: Feature, arrays: list[pa.Array], first: int) -> dict[str, np.ndarray]:
    decoded = single_values.numeric(feature, arrays)
    if decoded.bad is not None:
        found = decoded.stored[int(np.flatnonzero(decoded.bad)[0])].item()
        _fail(decoded.bad, first, feature.column, found, single_values.expected_number(feature))
    found = {feature.name: decoded.values}
    return found | ({f"{feature.name}_missing": decoded.absent()} if feature.indicator else {})


def _vector(feature: Feature, arrays: list[pa.Array], first: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the vectors and, by its name, their indicator."""
    decoded = vectors.vectors(feature, arrays)
    if decoded.bad is not None:
        found = decoded.found(int(np.flatnonzero(decoded.bad)[0]))
        _fail(decoded.bad, first, feature.column, found, vectors.expected(feature))
    return decoded.values, {f"{feature.name}_missing": decoded.absent()} if feature.indicator else {}


def _ids(feature: Feature, chunks: Mapping[str, list[pa.Array]], first: int) -> Ids:
    arrays = _column(feature, chunks)
    if is_bag(feature):
        bags, problems = decode_bags(feature, arrays, chunks[feature.weights] if feature.weights else None)
        _fail_of(problems, first)
        return bags
    decoded = single_values.single(feature, arrays)
    if decoded.bad is not None:
        row = int(np.flatnonzero(decoded.bad)[0])
        _fail(decoded.bad, first, feature.column, decoded.found(row), single_values.expected_id(feature))
    return decoded
