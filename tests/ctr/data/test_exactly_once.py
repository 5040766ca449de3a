"""The promises of the order: every row once whatever stops and goes on, the same batches for any ranks."""

import json
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.row_groups import RowGroupReader

from .rows import features, write

SCHEMA = features("row", {"name": "x", "kind": "numeric"}, {"name": "bag", "kind": "ids"}, group="row")


@st.composite
def data_sets(draw):
    """Rows of each file, rows of a row group, and what shapes the order."""
    files = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(sum))
    options = {
        "seed": draw(st.integers(0, 3)),
        "shuffle": draw(st.booleans()),
        "lanes": draw(st.integers(1, 9)),
        "window_rows": draw(st.integers(1, 40)),
        "threads": draw(st.integers(1, 3)),
    }
    return files, draw(st.integers(1, 70)), options


def build(folder, files: list[int], row_group_size: int) -> str:
    tables, start = [], 0
    for rows in files:
        row = np.arange(start, start + rows)
        bags = pa.array([[r] * (r % 3) for r in row.tolist()], pa.list_(pa.int64()))
        tables.append({"label": row % 2, "row": row, "x": row / 2, "bag": bags})
        start += rows
    return write(folder, *tables, row_group_size=row_group_size)


def rows_of(batch) -> list[int]:
    """The rows of a batch, after checking that all its parts speak of the same rows."""
    rows = batch.group[: batch.rows]
    assert batch.ids["row"].values().tolist() == rows.tolist()
    assert batch.ids["row"].lengths().tolist() == [1] * batch.rows + [0] * (len(batch.weight) - batch.rows)
    assert batch.ids["bag"].values().tolist() == [r for r in rows.tolist() for _ in range(r % 3)]
    assert (batch.numeric[: batch.rows, 0] == rows / 2).all()
    assert (batch.labels[: batch.rows, 0] == rows % 2).all()
    assert batch.weight.tolist() == [1] * batch.rows + [0] * (len(batch.weight) - batch.rows)
    assert not batch.numeric[batch.rows :].any() and not batch.labels[batch.rows :].any()
    return rows.tolist()


def global_batches(path, batch_size, world_size, options, state=None, epoch=2, stop=None):
    """Rows of every global batch, the state after `stop` of them, and a reader."""
    readers = [ParquetReader(path, SCHEMA, batch_size, r, world_size, **options) for r in range(world_size)]
    if state is not None:
        for reader in readers:
            reader.load_state(json.loads(json.dumps(state)))
    epochs = [reader.epoch(epoch) for reader in readers]
    batches = []
    while stop is None or len(batches) < stop:
        step = [next(one, None) for one in epochs]
        if step[0] is None:
            assert all(batch is None for batch in step), "ranks disagree on the end"
            break
        assert len({len(batch.weight) for batch in step}) == 1, "ranks disagree on the size of a step"
        batches.append([row for batch in step for row in rows_of(batch)])
    states = [reader.state() for reader in readers]
    for one in epochs:
        one.close()
    assert all(state == states[0] for state in states)
    return batches, states[0], readers[0]


quick = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(data=st.data(), data_set=data_sets(), batch_sizes=st.tuples(st.integers(1, 50), st.integers(1, 50)))
@settings(quick, max_examples=30)
def test_rows_before_a_stop_and_after_it_are_all_rows_once(tmp_path_factory, data, data_set, batch_sizes):
    files, group_rows, options = data_set
    path = build(tmp_path_factory.mktemp("d"), files, group_rows)
    before, after = (data.draw(st.integers(1, options["lanes"])) for _ in range(2))
    stop = data.draw(st.integers(0, sum(files) // batch_sizes[0] + 1))
    first, state, _ = global_batches(path, batch_sizes[0], before, options, stop=stop)
    rest, _, _ = global_batches(path, batch_sizes[1], after, options, state)
    rows = [row for batch in first + rest for row in batch]
    assert sorted(rows) == list(range(sum(files)))


@given(data=st.data(), data_set=data_sets(), batch_size=st.integers(1, 50))
@settings(quick, max_examples=20)
def test_a_global_batch_does_not_depend_on_the_ranks(tmp_path_factory, data, data_set, batch_size):
    files, group_rows, options = data_set
    path = build(tmp_path_factory.mktemp("d"), files, group_rows)
    world_size = data.draw(st.integers(1, options["lanes"]))
    alone, _, reader = global_batches(path, batch_size, 1, options)
    assert global_batches(path, batch_size, world_size, options)[0] == alone
    assert len(alone) == reader.steps_per_epoch
    assert [len(batch) for batch in alone[:-1]] == [batch_size] * (len(alone) - 1), "full but for the last"


@given(data=st.data(), data_set=data_sets(), batch_size=st.integers(1, 50))
@settings(quick, max_examples=15)
def test_a_continued_epoch_is_bit_identical(tmp_path_factory, data, data_set, batch_size):
    files, group_rows, options = data_set
    path = build(tmp_path_factory.mktemp("d"), files, group_rows)
    world_size = data.draw(st.integers(1, options["lanes"]))
    rank = data.draw(st.integers(0, world_size - 1))
    make = lambda: ParquetReader(path, SCHEMA, batch_size, rank, world_size, **options)  # noqa: E731
    whole = list(make().epoch(1))
    stop = data.draw(st.integers(0, len(whole)))
    stopped = make()
    epoch = stopped.epoch(1)
    for _ in range(stop):
        next(epoch)
    state = stopped.state()
    epoch.close()
    assert sum(state["lane_offsets"]) == (whole[stop - 1].position if stop else 0)
    if stop:
        assert state == stopped.state(whole[stop - 1]), "of the batch last delivered, by itself or by name"
    continued = make()
    continued.load_state(state)
    rest = list(continued.epoch(1))
    assert len(rest) == len(whole) - stop
    for one, other in zip(whole[stop:], rest, strict=True):
        for name in ("numeric", "labels", "weight", "group"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(one.ids.values(), other.ids.values())
        assert torch.equal(one.ids.lengths(), other.ids.lengths())
        assert (one.rows, one.position) == (other.rows, other.position)


def test_epochs_seeds_and_shuffle(tmp_path):
    path = build(tmp_path / "d", [500, 300], 100)
    order = {}
    for key, options, epoch in [
        ("plain", {}, 0),
        ("again", {}, 0),
        ("epoch", {}, 1),
        ("seed", {"seed": 1}, 0),
        ("off", {"shuffle": False}, 0),
        ("off, epoch", {"shuffle": False}, 1),
    ]:
        reader = ParquetReader(path, SCHEMA, 64, window_rows=50, lanes=4, **options)
        order[key] = [row for batch in reader.epoch(epoch) for row in rows_of(batch)]
        assert sorted(order[key]) == list(range(800))
    assert order["plain"] == order["again"] and order["off"] == order["off, epoch"]
    different = [order[key] for key in ("plain", "epoch", "seed", "off")]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])
    spread = np.mean([np.std(order["plain"][i : i + 64]) for i in range(0, 800, 64)])
    assert spread > 150, "rows of one batch come from all over the files (231 if uniform, 18 if not shuffled)"


def test_one_lane_without_shuffle_is_the_order_of_the_files(tmp_path):
    path = build(tmp_path / "d", [50, 30], 20)
    reader = ParquetReader(path, SCHEMA, 7, lanes=1, shuffle=False)
    assert [row for batch in reader.epoch(0) for row in rows_of(batch)] == list(range(80))


def test_more_ranks_than_row_groups(tmp_path):
    path = build(tmp_path / "d", [10], 10)
    batches, _, _ = global_batches(path, 4, 8, {"lanes": 8})
    assert sorted(row for batch in batches for row in batch) == list(range(10))


def test_the_next_epoch_starts_at_its_beginning(tmp_path):
    reader = ParquetReader(build(tmp_path / "d", [40], 10), SCHEMA, 16, lanes=2)
    for epoch in (0, 1):
        assert sorted(row for batch in reader.epoch(epoch) for row in rows_of(batch)) == list(range(40))
    state = reader.state()
    assert state["epoch"] == 1 and sum(state["lane_offsets"]) == 40
    reader.load_state(state)
    assert list(reader.epoch(1)) == [], "a finished epoch has nothing left"
    reader.load_state(state)
    assert sum(batch.rows for batch in reader.epoch(2)) == 40


def test_a_data_set_may_move(tmp_path):
    state = None
    rows = []
    for name in ("here", "there"):
        reader = ParquetReader(build(tmp_path / name, [90], 20), SCHEMA, 16, lanes=3)
        if state is not None:
            reader.load_state(state)
        for batch in reader.epoch(0):
            rows += rows_of(batch)
            if state is None and len(rows) >= 40:
                break
        state = reader.state()
    assert sorted(rows) == list(range(90))


@pytest.mark.parametrize("leave", ["close", "error", "drop"])
def test_leaving_early_ends_the_threads(tmp_path, leave):
    before = threading.active_count()
    path = build(tmp_path / "d", [2000], 100)
    epoch = ParquetReader(path, SCHEMA, 16, window_rows=50, threads=3).epoch(0)
    next(epoch)
    assert threading.active_count() > before
    if leave == "close":
        epoch.close()
    elif leave == "error":
        with pytest.raises(ZeroDivisionError):
            epoch.throw(ZeroDivisionError())
    del epoch
    assert threading.active_count() == before


def test_lanes_that_begin_in_one_row_group_decode_it_once(tmp_path, monkeypatch):
    decoded = []
    decode = RowGroupReader.parquet
    monkeypatch.setattr(RowGroupReader, "parquet", lambda self, g: decoded.append(g) or decode(self, g))
    path = build(tmp_path / "d", [1000], 1000)
    reader = ParquetReader(path, SCHEMA, 100, lanes=16, threads=4)
    assert sum(batch.rows for batch in reader.epoch(0)) == 1000
    assert decoded == [0]


def test_windows_of_an_epoch_lie_in_the_memory_of_the_epoch_before(tmp_path):
    path = build(tmp_path, [1000, 500], 300)
    reader = ParquetReader(path, SCHEMA, batch_size=128, lanes=4, window_rows=200)

    def lent() -> set[int]:
        assert sum(batch.rows for batch in reader.epoch(0)) == 1500
        return {id(buffer) for buffers in reader.buffers._free.values() for buffer in buffers}

    assert lent() == lent() != set()
