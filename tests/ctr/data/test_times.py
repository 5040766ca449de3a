"""Event times: units, the plausible calendar, and rows far ahead of all others."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.times import TimeRule, far_future

from .rows import features, read_in_order, write

N, NOW, DAY, YEAR = 400, 1_767_225_600, 86_400, 365 * 86_400


def data(tmp_path, times) -> str:
    size = len(times)
    columns = {"label": np.arange(size) % 2, "a": np.arange(size), "t": times}
    return write(tmp_path / "d", columns, row_group_size=200)


def users(reader: ParquetReader) -> list[int]:
    return sorted(i for batch in reader.epoch(0) for i in batch.ids.values().tolist())


@pytest.mark.parametrize("unit, ticks", [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_integers_are_in_the_unit_of_the_schema(tmp_path, unit, ticks):
    path = data(tmp_path, np.arange(N) * ticks + NOW * ticks + ticks // 2)
    rows = read_in_order(path, features("a", time="t", time_unit=unit))
    assert [row["time"] for row in rows] == list(range(NOW, NOW + N))


@pytest.mark.parametrize("bad_rows", ["raise", "skip"])
@pytest.mark.parametrize(
    "unit, times, words",
    [
        (
            "s",
            NOW * 10**3 + np.arange(N),
            ["s (the year 57", "as ms it would be plausible (data.schema.time_unit=ms)"],
        ),
        ("s", NOW * 10**6 + np.arange(N), ["as us it would be plausible"]),
        ("s", NOW * 10**9 + np.arange(N), ["as ns it would be plausible"]),
        ("ms", NOW + np.arange(N), ["ms (the year 1970)", "as s it would be plausible"]),
        ("s", pa.array(NOW + np.arange(N)).cast(pa.timestamp("ms")), ["timestamp[ms]", "looks like s", "true unit"]),
    ],
)
def test_a_wrong_unit_is_an_error_that_names_the_right_one(tmp_path, bad_rows, unit, times, words):
    """Whatever is done about bad rows: it is the schema that is wrong."""
    path, schema = data(tmp_path, times), features("a", time="t", time_unit=unit)
    reader = ParquetReader(path, schema, 50, bad_rows=bad_rows, shuffle=False)
    with pytest.raises(SchemaError) as error:
        list(reader.epoch(0))
    for word in ["part-0.parquet", "row group 0 row 0", "column 't'", "expected a time from 1990-01-01", *words]:
        assert word in str(error.value), error.value


def test_half_a_column_of_garbage_is_bad_rows(tmp_path):
    times = NOW + np.arange(N)
    times[::2] = 2**40
    reader = ParquetReader(data(tmp_path, times), features("a", time="t"), 50, bad_rows="skip", lanes=1)
    assert users(reader) == list(range(1, N, 2)) and reader.bad_row_counts == {"time": N // 2}


@pytest.mark.parametrize("lanes, window_rows", [(1, 1000), (3, 1000), (2, 120)])
@pytest.mark.parametrize("ahead", [YEAR + DAY, 30 * YEAR])
def test_few_rows_far_ahead_of_all_others_are_bad(tmp_path, lanes, window_rows, ahead):
    times = NOW + np.arange(N) * 60
    times[57] += ahead
    path, schema = data(tmp_path, times), features("a", time="t")
    options = {"lanes": lanes, "window_rows": window_rows}
    with pytest.raises(DataError, match="row 57: column 't' found .*, expected a time within 365 days of another row"):
        list(ParquetReader(path, schema, 50, shuffle=False, **options).epoch(0))
    for world in (1, lanes):
        readers = [ParquetReader(path, schema, 50, rank, world, bad_rows="skip", **options) for rank in range(world)]
        assert sorted(i for reader in readers for i in users(reader)) == [i for i in range(N) if i != 57]
        assert sum(reader.bad_row_counts.get("time", 0) for reader in readers) == 1
    wider = features("a", time="t", time_jump_days=ahead / DAY + 1)
    assert len(read_in_order(path, wider, **options)) == N


def test_rows_before_the_others_and_real_gaps_are_kept(tmp_path):
    times = NOW + np.arange(N) * 60
    times[:2] -= 20 * YEAR  # few old rows do no harm
    times[200:] += 2 * YEAR  # half of the data lie behind a gap
    path = data(tmp_path, times)
    assert len(read_in_order(path, features("a", time="t"))) == N


RULE = TimeRule.of("t", "s", "1990-01-01", "2100-01-01", 1.0)


@pytest.mark.parametrize(
    "times, found",
    [
        ([0] * 99 + [10 * DAY], [99]),
        ([10 * DAY] + [0] * 50 + [20 * DAY] + [7] * 300, [0, 51]),  # each of them lies alone
        ([0] * 98 + [10 * DAY] * 2, []),  # more than one in a hundred
        ([0] * 98 + [10 * DAY], []),  # too few rows to tell
        ([0] * 99 + [DAY], []),  # no empty stretch of more than a day
        ([5 * DAY] * 99 + [0], []),
        (list(range(0, 200 * DAY, 2 * DAY)), []),  # all lie alone
    ],
)
def test_far_ahead(times, found):
    times = np.array(times, np.int64)
    ahead = far_future(RULE, times, np.ones(len(times), bool))
    assert ([] if ahead is None else np.flatnonzero(ahead).tolist()) == found


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"time_unit": "sec"}, "schema.time_unit: found 'sec', expected one of s, ms, us, ns"),
        ({"time_from": "yesterday"}, "schema.time_from: found 'yesterday', expected a date as 1990-01-01"),
        ({"time_from": "2100-01-01"}, "schema.time_from: found 2100-01-01, expected a date before time_to 2100-01-01"),
        ({"time_jump_days": 0}, "schema.time_jump_days: found 0.0, expected a number above 0"),
    ],
)
def test_keys_that_mean_nothing(keys, message):
    with pytest.raises(SchemaError) as error:
        features("a", time="t", **keys)
    assert str(error.value) == message


def test_a_range_of_ones_own(tmp_path):
    """Data whose times were made to begin at 0."""
    path = data(tmp_path, np.arange(N))
    with pytest.raises(DataError, match="found 0 s .the year 1970., expected a time from 1990-01-01 to 2100-01-01"):
        read_in_order(path, features("a", time="t"))
    assert len(read_in_order(path, features("a", time="t", time_from="1970-01-01"))) == N
