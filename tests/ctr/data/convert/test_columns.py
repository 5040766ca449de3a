import datetime

import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.convert.columns import Column, check_columns, make_columns, text_types
from tessera.ctr.data.convert.delimited import BadRows, TextTable
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.times import TimeRule


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


SECONDS = "%Y-%m-%d %H:%M:%S"


@pytest.mark.parametrize(
    "pattern, good, bad",
    [
        (
            "%Y-%m-%d",
            ["2026-02-28", "2024-02-29", "2026-2-1"],
            ["2026-02-30", "2026-02-29", "2025-02-29", "2026-04-31"],
        ),
        ("%d.%m.%Y", ["28.02.2026", "1.3.2026"], ["31.02.2026", "29.02.2025", "31.11.2026"]),
        ("%Y%m%d", ["20260228"], ["20260230", "20260431", "20261301"]),
        ("%d %b %Y", ["28 FEB 2026", "01 mar 2026"], ["29 feb 2026", "31 Apr 2026"]),
        ("%F", ["2026-02-28"], ["2026-02-30", "2026-06-31"]),
        ("%m/%d/%y %I:%M %p", ["02/28/26 12:05 AM"], ["02/29/26 12:05 AM", "02/28/26 13:05 AM"]),
        (SECONDS, ["2026-01-01 23:59:59"], ["2026-01-01 24:00:00", "2026-01-01 25:00:00", "2026-01-01 -1:00:00"]),
        (SECONDS, ["2026-01-01 00:00:00"], ["2026-01-01 23:60:00", "2026-01-01 23:61:00", "2026-01-01 23:99:00"]),
        ("%F %T", ["2016-12-31 23:59:59"], ["2016-12-31 23:59:60", "2026-12-31 23:59:61", "2026-12-31 23:59:62"]),
        ("%Y %j", ["2024 366", "2026 365"], ["2026 366", "2026 367", "2026 000"]),
        ("%Y-%m-%dT%H:%M:%S%z", ["2026-02-28T00:00:00+0200", "2026-02-28T00:00:00Z"], ["2026-02-30T00:00:00Z"]),
    ],
)
def test_a_date_that_does_not_exist_is_a_bad_row(pattern, good, bad):
    column = Column("t", type="time", format=pattern)
    made, lines, skipped = make(column, [*good, *bad, None], "skip")
    assert made[-1] is None and len(made) == len(good) + 1 and skipped == len(bad)
    plain = {"%F": "%Y-%m-%d", "%F %T": SECONDS}.get(pattern, pattern)
    read = [datetime.datetime.strptime(text, plain) for text in good]
    expected = [one if one.tzinfo else one.replace(tzinfo=datetime.timezone.utc) for one in read]
    assert made[:-1] == [int(one.timestamp()) for one in expected]
    for text in bad:
        with pytest.raises(DataError, match="log line 11: column 't': expected a time as"):
            make(column, [good[0], text])


RULE = TimeRule.of("t", "s", "1990-01-01", "2100-01-01", 365.0)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize(
    "unit, number, guess",
    [
        ("seconds", 1_767_225_600_123.0, "milliseconds"),
        ("seconds", 1_767_225_600_123_000.0, "microseconds"),
        ("milliseconds", 1_767_225_600.0, "seconds"),
        ("microseconds", 1_767_225_600_123.0, "milliseconds"),
    ],
)
def test_a_wrong_unit_is_an_error_that_names_the_right_one(policy, unit, number, guess):
    column = Column("t", type="time", format=unit, rule=RULE)
    message = f"log: column 't': expected a time from 1990-01-01 to 2100-01-01 as {unit}, found {number:.0f}"
    with pytest.raises(SchemaError, match=f"{message}; as {guess} it would be plausible .format: {guess}."):
        make(column, [number + i for i in range(20)], policy)


def test_an_implausible_time_is_a_bad_row():
    column = Column("t", type="time", rule=RULE)
    times = [1.8e9 + i for i in range(20)]
    assert make(column, [*times, 2.0**40, -5.0, 0.0, 1.8e12], "skip")[1:] == (list(range(10, 30)), 4)
    with pytest.raises(DataError, match="from 1990-01-01 to 2100-01-01 as seconds, found '1800000000000"):
        make(column, [*times, 1.8e12])
    pattern = Column("t", type="time", format="%Y", rule=RULE)
    assert make(pattern, ["2026", "1989", "2100"], "skip")[2] == 2
    assert make(Column("born", type="time", format="%Y"), ["1950"])[2] == 0  # not the column of event times


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
