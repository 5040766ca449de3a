"""A snapshot gives the rows of its moment, whatever happens to the table before they are read."""

import queue
import sys
import threading

import pytest
import torch

from tessera.embedding import set_snapshot
from tessera.embedding import snapshot as snapshot_module
from tessera.embedding import table as dynamic_table
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tessera.embedding.table import DynamicTable
from tests.embedding.conftest import both_kinds

pytestmark = [both_kinds, pytest.mark.usefixtures("of_table")]

FLOATS = (Group("v", 4, 0.5), Group("w", 1, 0.5))
INT8 = (Group("v", 4, 0.5, format="int8", scale=0.01, learned=ScaleOptimizer(lr=1e-3)), Group("w", 1, 0.5))


def make(groups=FLOATS) -> DynamicTable:
    """Rows come, go by age and at the limit, and are taken again by other ids."""
    optimizer = RowOptimizer("adam", lr=0.1)
    life = {"ttl_seconds": 4, "max_rows": 230, "eviction": "lru", "chunk_rows": 64}
    return DynamicTable(DynamicTableConfig("a", ("a",), groups, optimizer, seed=3, **life))


def step(table: DynamicTable, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    ids = torch.cat([torch.randint(1000, 2000, (40,), generator=generator).unique(), torch.arange(number % 5, 90, 4)])
    rows = table.lookup(ids, now=100 + number)
    grads = torch.randn(len(ids), 5, generator=generator)
    if table.config.groups[0].learned is None:
        table.update(rows, grads)
    else:
        table.begin_update(rows, grads).learn(grads)
    table.expire(100 + number)


def held(table: DynamicTable) -> list:
    """What rows are kept for."""
    return table._snapshots if isinstance(table, dynamic_table.DynamicTable) else table.set._kept


def content(batch) -> dict[int, tuple]:
    columns = [c for c in (batch.rows, batch.values, batch.state, batch.last_seen, batch.count, batch.scale)]
    return {
        i: tuple(c[place].numpy().tobytes() for c in columns if c is not None)
        for place, i in enumerate(batch.ids.tolist())
    }


def now(table: DynamicTable, since: int | None = None) -> dict[int, tuple]:
    return content(table.read_rows(table.rows_in_use(since)))


@pytest.mark.parametrize("groups", [FLOATS, INT8])
@pytest.mark.parametrize("steps_before", [0, 1, 12])
@pytest.mark.parametrize("late", [True, False])
def test_rows_are_those_of_the_moment(groups, steps_before, late):
    """Some are read before, some while, some after others change."""
    table = make(groups)
    for number in range(steps_before):
        step(table, number)
    expected, snapshot = now(table), table.snapshot()
    if late:
        for number in range(12, 15):
            step(table, number)
    rows, ids = snapshot.rows_in_use()
    assert sorted(ids.tolist()) == sorted(expected)
    found = {}
    for number, some in enumerate(rows[torch.randperm(len(rows))].split(20)):
        found |= content(snapshot.read(some))
        step(table, 15 + number)
    assert found == expected
    snapshot.release()
    snapshot.release()
    assert not held(table)
    again, third = table.snapshot(), table.snapshot()
    copies = [getattr(one, "kept", one).copies for one in (again, snapshot, third)]
    assert copies[0] is copies[1] is not copies[2]


def test_one_is_released_while_another_is_taken():
    """A thread that has written one state lets go of its snapshot just as the next is taken."""
    table = make()
    step(table, 1)
    released: queue.SimpleQueue = queue.SimpleQueue()

    def release() -> None:
        while (snapshot := released.get()) is not None:
            snapshot.release()

    thread = threading.Thread(target=release)
    thread.start()
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(2000):
            snapshot = table.snapshot()
            assert any(known is getattr(snapshot, "kept", snapshot) for known in held(table))
            released.put(snapshot)
    finally:
        sys.setswitchinterval(switch_interval)
        released.put(None)
        thread.join()
    assert not held(table)


def test_rows_touched_since_a_mark():
    table = make()
    for number in range(6):
        step(table, number)
    mark = table.mark()
    for number in range(6, 8):
        step(table, number)
    expected, snapshot = now(table, mark), table.snapshot()
    table.mark()
    for number in range(8, 20):
        step(table, number)
    rows, _ = snapshot.rows_in_use(mark)
    assert content(snapshot.read(rows)) == expected
    assert 0 < len(expected) < 230


def test_rows_that_are_imported_over():
    table = make()
    step(table, 1)
    before, snapshot = now(table), table.snapshot()
    batch = table.read_rows(table.rows_in_use())
    batch.rows, batch.values = None, batch.values + 1
    table.import_rows(batch)
    rows, _ = snapshot.rows_in_use()
    assert content(snapshot.read(rows)) == before != now(table)


def test_a_thread_reads_while_training_goes_on(monkeypatch):
    """Two snapshots at once, each read by a thread of its own, in small pieces."""
    for module in (snapshot_module, set_snapshot):
        monkeypatch.setattr(module, "SCAN_ROWS", 16)
    table, found, threads, expected = make(), {}, [], {}
    for number in range(12):
        step(table, number)

    def read(name: int, snapshot) -> None:
        rows, _ = snapshot.rows_in_use()
        found[name] = {i: row for piece in rows.split(7) for i, row in content(snapshot.read(piece)).items()}

    for name in range(2):
        expected[name] = now(table)
        threads.append(threading.Thread(target=read, args=(name, table.snapshot())))
        threads[-1].start()
        for number in range(12 + 10 * name, 22 + 10 * name):
            step(table, number)
    for thread in threads:
        thread.join()
    assert found == expected and expected[0] != expected[1]
