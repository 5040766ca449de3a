import datetime

import numpy as np
import pyarrow as pa
import pytest

from ctr.data.convert.columns import Column, check_columns, make_columns, text_types
from ctr.data.convert.delimited import BadRows, TextTable
from ctr.data.errors import DataError, SchemaError


def make(column: Column, values: list, policy="raise"):
    table = pa.table({column.text_column: pa.array(values, column.text_type)})
    bad_rows = BadRows(policy)
    made = make_columns(TextTable("log", table, np.arange(10, 10 + len(values))), [column], bad_rows)
    assert made.table.schema.field(0).type == column.stored_type
    return made.table.column(0).to_pylist(), made.lines.tolist(), bad_rows.skipped


def test_hexadecimal_ids_keep_all_64_bits():
    values = ["0", "ff", "68fd1e64", "FFFFFFFFFFFFFFFF", None, "8000000000000000"]
    expected = [None if v is None else int(np.array(int(v, 16), np.uint64).astype(np.int64)) for v in values]
    assert make(Column("c", type="hex"), values)[0] == expected


def test_time_patterns_are_utc_and_checked():
    column = Column("t", type="time", format="%y%m%d%H")
    day = datetime.datetime(2014, 10, 21, 5, tzinfo=datetime.timezone.utc)
    assert make(column, ["14102105", None])[0] == [int(day.timestamp()), None]
    with pytest.raises(DataError, match="log line 11: column 't': expected a time as %y%m%d%H, found '14109900'"):
        make(column, ["14102105", "14109900"])
    assert make(Column("t", type="time", format="milliseconds"), [1414281600999.0, None])[0] == [
        1414281600,
        None,
    ]
    assert make(Column("t", type="time"), [-0.5, 2.0, float("nan")], "skip") == ([-1, 2], [10, 11], 1)


def test_lists_split_and_numbers_in_them_are_checked():
    words = Column("g", type="list<string>", delimiter="|")
    assert make(words, ["a|b", "", None, "|c||d|"])[0] == [["a", "b"], [], None, ["c", "d"]]
    numbers = Column("g", type="list<int64>", delimiter=" ")
    assert make(numbers, ["1 -2", "3 x", "4"], "skip") == ([[1, -2], [4]], [10, 12], 1)
    weights = Column("g", type="list<float32>", delimiter=",")
    assert make(weights, ["0.5,1e2", "nan,1", ".25"], "skip") == ([[0.5, 100.0], [0.25]], [10, 12], 1)


def test_values_nulls_and_numbers_that_are_not_finite():
    label = Column("y", type="int8", values=(0, 1))
    assert make(label, [0, 1, 7, None], "skip") == ([0, 1], [10, 11], 2)
    with pytest.raises(DataError, match="line 10: column 'y': expected one of 0, 1, found '7'"):
        make(label, [7])
    assert make(Column("x", type="float32"), [1.0, float("inf"), float("nan"), None], "skip")[0] == [
        1.0,
        None,
    ]
    assert make(Column("u", required=True), [1, None], "skip") == ([1], [10], 1)
    assert make(Column("n", stored="float32"), [3, None, 16777217])[0] == [3.0, None, 16777216.0]


def test_contradictory_columns_are_refused():
    with pytest.raises(SchemaError, match="my.yaml: column 'a' has type 'integer', expected one of"):
        check_columns([Column("a", type="integer")], "my.yaml")
    with pytest.raises(SchemaError, match="my.yaml: column 'a' found twice"):
        check_columns([Column("a"), Column("a", "b")], "my.yaml")
    with pytest.raises(SchemaError, match="column 'b': reads 'a' as string, but another column reads it as int64"):
        text_types([Column("a"), Column("b", "a", "string")])
