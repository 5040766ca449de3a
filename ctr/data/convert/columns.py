"""Define the output columns: what is read from the text, what is written, and which values are bad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tessera.ctr.data.convert.delimited import BadRows, TextTable, shorten
from tessera.ctr.data.convert.times import (
    PER_SECOND,
    implausible,
    refuse_unit,
    seconds_of_numbers,
    seconds_of_text,
    unit_advice,
)
from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.times import TimeRule
from tessera.kernels.string_hash import hex_to_int64

PLAIN_TYPES = {
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
}
# Types that are read as text and made into something else.
MADE_TYPES = {
    "hex": pa.int64(),
    "time": pa.int64(),
    "hour": pa.int64(),
    "weekday": pa.int64(),
    "list<string>": pa.list_(pa.string()),
    "list<int64>": pa.list_(pa.int64()),
    "list<float32>": pa.list_(pa.float32()),
}
OF_A_TIME = {"hour": pc.hour, "weekday": pc.day_of_week}


@dataclass(frozen=True)
class Column:
    """One column of the output.

    name: in the output. source: in the text (default: name). type: a plain arrow type, or "hex" (1 to 16
    hexadecimal digits -> the 64 bits as int64), "time" (-> int64 seconds since 1970 UTC, by `format`:
    "seconds", "milliseconds", "microseconds", "nanoseconds" or a strptime pattern), "hour" and "weekday" (of
    such a time: 0 to 23, Monday is 0), "list<...>" (split at `delimiter`, runs of it count once). stored: plain
    type to write instead of `type`. values: the only values accepted; null is then bad too. required: null is
    bad. rule: which times are plausible, of the column of event times.
    """

    name: str
    source: str | None = None
    type: str = "int64"
    stored: str | None = None
    format: str = "seconds"
    delimiter: str = " "
    values: tuple[int, ...] | None = None
    required: bool = False
    rule: TimeRule | None = None

    @property
    def text_column(self) -> str:
        return self.source or self.name

    @property
    def of_time(self) -> bool:
        return self.type == "time" or self.type in OF_A_TIME

    @property
    def text_type(self) -> pa.DataType:
        """Arrow type that the text is parsed to."""
        if self.of_time and self.format in PER_SECOND:
            return pa.float64()
        return PLAIN_TYPES.get(self.type, pa.string())

    @property
    def stored_type(self) -> pa.DataType:
        if self.stored:
            return PLAIN_TYPES[self.stored]
        return PLAIN_TYPES.get(self.type) or MADE_TYPES[self.type]


def check_columns(columns: Sequence[Column], where: str) -> None:
    """Raise SchemaError for a type that is not known or a name used twice; `where` names the file with the
    mistake."""
    seen: set[str] = set()
    for column in columns:
        known = [*PLAIN_TYPES, *MADE_TYPES]
        if column.type not in known:
            raise SchemaError(f"{where}: column {column.name!r} has type {column.type!r}, expected one of {known}")
        if column.stored and column.stored not in PLAIN_TYPES:
            raise SchemaError(
                f"{where}: column {column.name!r} has stored {column.stored!r}, expected one of {list(PLAIN_TYPES)}"
            )
        if column.name in seen:
            raise SchemaError(f"{where}: column {column.name!r} found twice, expected once")
        seen.add(column.name)


def text_types(columns: Sequence[Column]) -> dict[str, pa.DataType]:
    """Return the arrow type to parse each text column to. Raises SchemaError if one text column is asked for as two
    types."""
    types: dict[str, pa.DataType] = {}
    for column in columns:
        known = types.setdefault(column.text_column, column.text_type)
        if known != column.text_type:
            raise SchemaError(
                f"column {column.name!r}: reads {column.text_column!r} as {column.text_type}, "
                f"but another column reads it as {known}; expected one type"
            )
    return types


def stored_schema(columns: Sequence[Column]) -> pa.Schema:
    return pa.schema([(column.name, column.stored_type) for column in columns])


def make_columns(text: TextTable, columns: Sequence[Column], bad_rows: BadRows) -> TextTable:
    """Return the output columns. Rows with a bad value are reported to `bad_rows` (which may raise) and left out."""
    made, bad = [], np.zeros(text.table.num_rows, dtype=bool)
    for column in columns:
        source = text.table.column(column.text_column).combine_chunks()
        array, wrong = _make(source, column, f"{text.path}: column {column.text_column!r}")
        made.append(array)
        if wrong is not None and wrong.any():
            for row in np.flatnonzero(wrong & ~bad):
                found = source[int(row)].as_py()
                shown = "nothing" if found is None else shorten(str(found))
                message = f"column {column.text_column!r}: expected {_expected(column)}, found {shown}"
                if column.rule and isinstance(found, float):
                    message += unit_advice(found, column.rule)
                bad_rows.meet(text.path, int(text.lines[row]), message)
            bad |= wrong
    table, lines = pa.table(made, schema=stored_schema(columns)), text.lines
    if bad.any():
        keep = ~bad
        bad_rows.rows_read -= int(bad.sum())
        table, lines = table.filter(pa.array(keep)), lines[keep]
    return TextTable(text.path, table, lines)


def _expected(column: Column) -> str:
    if column.values is not None:
        return "one of " + ", ".join(map(str, column.values))
    if column.type == "hex":
        return "1 to 16 hexadecimal digits"
    if column.of_time:
        return f"{column.rule.range if column.rule else 'a time'} as {column.format}"
    if column.type.startswith("list"):
        return f"{column.type} separated by {column.delimiter!r}"
    return "a finite number" if pa.types.is_floating(column.text_type) else "a value"


def _make(source: pa.Array, column: Column, where: str) -> tuple[pa.Array, np.ndarray | None]:
    """Return the array as stored, and a mask of bad rows or None if there are none. `where` names the file and the
    column."""
    wrong = None
    if column.type == "hex":
        array, wrong = _from_hex(source)
    elif column.of_time:
        array, wrong = _from_time(source, column, where)
        if column.type in OF_A_TIME:
            array = OF_A_TIME[column.type](array.cast(pa.timestamp("s")))
    elif column.type.startswith("list"):
        array, wrong = _from_delimited(source, column)
    else:
        array = source
        if pa.types.is_floating(source.type):
            finite = pc.fill_null(pc.is_finite(source), fill_value=True)
            wrong = ~finite.to_numpy(zero_copy_only=False)
    if column.values is not None:
        known = pc.is_in(array, pa.array(column.values, array.type))
        wrong = ~known.to_numpy(zero_copy_only=False)
    if column.required and source.null_count:
        null = source.is_null().to_numpy(zero_copy_only=False)
        wrong = null if wrong is None else wrong | null
    if column.stored:
        # Not "safe": integers above 2^24 lose their last bits in float32, as they would in the model.
        array = array.cast(column.stored_type, safe=not pa.types.is_floating(column.stored_type))
    return array, wrong


def _from_time(source: pa.Array, column: Column, where: str) -> tuple[pa.Array, np.ndarray]:
    numbers = column.format in PER_SECOND
    array, wrong = (seconds_of_numbers if numbers else seconds_of_text)(source, column.format)
    if column.rule is not None:
        outside = implausible(array, column.rule)
        if numbers and outside.any():
            refuse_unit(source, outside, column.rule, column.format, where)
        wrong = wrong | outside
    return array, wrong


def _from_hex(source: pa.Array) -> tuple[pa.Array, np.ndarray]:
    offsets, data = _string_buffers(source)
    ids, ok = hex_to_int64(torch.from_numpy(data), torch.from_numpy(offsets))
    # No digits at all are a missing id, as they are to the reader.
    null = pc.binary_length(source).fill_null(0).to_numpy(zero_copy_only=False) == 0
    return pa.array(ids.numpy(), mask=null if null.any() else None), ~(ok.numpy() | null)


def _string_buffers(source: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets int64 [n + 1] and bytes uint8 of a string array without offset (as combine_chunks gives it)."""
    _, offset_buffer, data_buffer = source.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32, len(source) + 1, source.offset * 4).astype(np.int64)
    # A copy, because torch warns about tensors over memory that cannot be written.
    data = np.frombuffer(data_buffer, np.uint8).copy() if data_buffer is not None else np.zeros(0, np.uint8)
    return offsets, data


def _from_delimited(source: pa.Array, column: Column) -> tuple[pa.Array, np.ndarray | None]:
    parts = pc.split_pattern(pc.utf8_trim(source, column.delimiter), column.delimiter)
    values, offsets = parts.values, parts.offsets.to_numpy()
    filled = pc.not_equal(values, "").to_numpy(zero_copy_only=False)
    kept = np.concatenate(([0], np.cumsum(filled)))[offsets].astype(np.int32)
    values = values.filter(pa.array(filled))
    wrong = None
    if column.stored_type.value_type != pa.string():
        number = pc.match_substring_regex(values, r"^[+-]?\d{1,18}$")
        if pa.types.is_floating(column.stored_type.value_type):
            number = pc.match_substring_regex(values, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?$")
        good = number.to_numpy(zero_copy_only=False)
        wrong = np.diff(np.concatenate(([0], np.cumsum(~good)))[kept]) > 0
        values = pc.if_else(number, values, "0").cast(column.stored_type.value_type)
    mask = source.is_null() if source.null_count else None
    return pa.ListArray.from_arrays(pa.array(kept), values, mask=mask), wrong
