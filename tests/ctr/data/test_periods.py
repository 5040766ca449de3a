"""Rows in order of time: day after day, shuffled within, every row once on any number of ranks, also after a stop."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.periods import span
from tessera.ctr.data.reader import ParquetReader
from tessera.embedding.errors import ConfigError

from .rows import features, write

DAYS, DAY, NOW = 5, 86_400, 20_454 * 86_400
ROWS = [70, 1, 130, 64, 25]  # of each day; they come in files of row groups of 20


def tables(days, unit="s") -> list[dict]:
    draw, found = np.random.default_rng(4), []
    for day in days:
        times = NOW + day * DAY + np.sort(draw.integers(0, DAY, ROWS[day]))
        found.append({"label": times % 2, "row": np.arange(ROWS[day]) + 1000 * day, "t": pa.array(times)})
    return found


SCHEMA = features("row", time="t")


def batches_of(path, batch_size=16, world=1, state=None, stop=None, epoch=1, **options):
    """Rows of every global batch, and the state behind the last one."""
    options = {"order": "time", "lanes": 6, "window_rows": 15, "seed": 2, **options}
    readers = [ParquetReader(path, SCHEMA, batch_size, rank, world, **options) for rank in range(world)]
    if state is not None:
        for reader in readers:
            reader.load_state(json.loads(json.dumps(state)))
    epochs, found = [reader.epoch(epoch) for reader in readers], []
    assert all(reader.steps_per_epoch == readers[0].steps_per_epoch for reader in readers)
    while stop is None or len(found) < stop:
        step = [next(one, None) for one in epochs]
        if step[0] is None:
            assert step == [None] * world
            break
        assert len({len(batch.weight) for batch in step}) == 1
        found.append([int(i) for batch in step for i in batch.ids.values()])
        for batch in step:
            assert (batch.time[: batch.rows] // DAY - NOW // DAY).tolist() == (batch.ids.values() // 1000).tolist()
    for one in epochs:
        one.close()
    return found, readers[0].state(), readers[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """The files lie in another order than their days."""
    return write(tmp_path_factory.mktemp("data"), *tables([3, 0, 4, 2, 1]), row_group_size=20)


def test_days_come_one_after_the_other_and_are_shuffled(data):
    found, _, reader = batches_of(data)
    days = [{row // 1000 for row in batch} for batch in found]
    assert all(len(day) == 1 for day in days) and [min(day) for day in days] == sorted(min(day) for day in days)
    rows = [row for batch in found for row in batch]
    assert sorted(rows) == sorted(i + 1000 * day for day in range(DAYS) for i in range(ROWS[day])) and rows != sorted(
        rows
    )
    assert len(found) == reader.steps_per_epoch == reader.steps_done == sum(-(-rows // 16) for rows in ROWS)
    again, other = batches_of(data)[0], batches_of(data, epoch=2)[0]
    assert again == found != other
    plain = [row for batch in batches_of(data, shuffle=False, lanes=1)[0] for row in batch]
    assert plain == sorted(plain)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_batches_are_the_same_on_any_number_of_ranks(data, world):
    alone, several = batches_of(data)[0], batches_of(data, world=world)[0]
    assert [sorted(batch) for batch in several] == [sorted(batch) for batch in alone]


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 14, 20])
def test_a_stop_anywhere_goes_on_exactly_on_other_ranks(data, stop):
    """Also with another size of batches: the rest of the day comes first, then the days behind it."""
    whole = batches_of(data)[0]
    begun, state, reader = batches_of(data, world=2, stop=stop)
    assert reader.steps_done == stop
    rest = batches_of(data, world=3, state=state)[0]
    assert [sorted(batch) for batch in begun + rest] == [sorted(batch) for batch in whole]
    rest = batches_of(data, batch_size=9, state=state)[0]
    assert sorted(row for batch in begun + rest for row in batch) == sorted(row for batch in whole for row in batch)
    assert [batch[0] // 1000 for batch in rest] == sorted(batch[0] // 1000 for batch in rest)


def test_longer_periods_and_states_of_another_order(data):
    found, state, _ = batches_of(data, period_days=3, stop=3)
    kinds = [{row // 1000 for row in batch} for batch in batches_of(data, period_days=3)[0]]
    assert max(map(len, kinds)) > 1 and all(max(one) - min(one) < 3 for one in kinds)
    expected = "data.order found {}, expected time with data.period_days 3 as saved"
    with pytest.raises(DataError, match=expected.format("time with data.period_days 1")):
        batches_of(data, state=state)
    with pytest.raises(DataError, match=expected.format("mixed")):
        batches_of(data, state=state, order="mixed")


@pytest.mark.parametrize("stored", [pa.timestamp("ms"), pa.timestamp("us", "UTC"), pa.timestamp("ns"), pa.date32()])
def test_times_of_any_type_order_the_rows(tmp_path, stored):
    seconds = pa.timestamp("s", stored.tz if pa.types.is_timestamp(stored) else None)
    typed = [one | {"t": one["t"].cast(seconds).cast(stored, safe=False)} for one in tables([1, 0, 2])]
    rows = [row for batch in batches_of(write(tmp_path / "d", *typed, row_group_size=20))[0] for row in batch]
    assert [row // 1000 for row in rows] == [0] * 70 + [1] + [2] * 130


def test_a_bad_row_does_not_move_its_row_group(tmp_path):
    some = tables([2, 0])
    for place, wrong in ((5, 2**40), (65, -7)):
        times = some[0]["t"].to_numpy().copy()
        times[place] = wrong
        some[0]["t"] = pa.array(times)
    path = write(tmp_path / "d", *some, row_group_size=20)
    reader = ParquetReader(path, SCHEMA, 16, order="time", bad_rows="skip")
    rows = [int(i) for batch in reader.epoch(0) for i in batch.ids.values()]
    assert [row // 1000 for row in rows] == [0] * 70 + [2] * 128 and reader.bad_row_counts == {"time": 2}


def test_what_cannot_be_read_in_order_of_time(tmp_path, data):
    path = write(tmp_path / "wide", *tables([0, 3]), row_group_size=20)
    mixed = {name: np.concatenate([t[name] for t in tables([0, 3])])[::2] for name in ("label", "row", "t")}
    path = write(tmp_path / "mixed", mixed, row_group_size=1000)
    message = (
        r"part-0.parquet row group 0: its rows are from 2026-01-01 .* to 2026-01-04 .*, more than data.period_days 1;"
    )
    with pytest.raises(DataError, match=message):
        ParquetReader(path, SCHEMA, 16, order="time")
    assert ParquetReader(path, SCHEMA, 16, order="time", period_days=7).rows == 67
    path = write(tmp_path / "bare", *tables([0]), write_statistics=False)
    with pytest.raises(DataError, match="part-0.parquet row group 0: its footer has no smallest and largest 't'"):
        ParquetReader(path, SCHEMA, 16, order="time")
    with pytest.raises(ConfigError, match="data.order is time, but data.schema.time names no column"):
        ParquetReader(data, features("row"), 16, order="time")
    with pytest.raises(ConfigError, match="data.order: found 'tim'; did you mean 'time'?"):
        ParquetReader(data, SCHEMA, 16, order="tim")
    with pytest.raises(ConfigError, match="data.period_days: found 0, expected a number above 0"):
        ParquetReader(data, SCHEMA, 16, order="time", period_days=0)


def test_the_span_of_the_data(data):
    reader = ParquetReader(data, SCHEMA, 16)
    assert DAY * (DAYS - 1) < span(reader.groups, SCHEMA.times) < DAY * DAYS
