"""What a table promises beyond single calls: order, exact continuation, bounded work, statistics."""

import dataclasses

import pytest
import torch

from tessera.embedding.config import Admission, DynamicTableConfig, Group, TableConfig
from tessera.embedding.errors import TableFull
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.table import DynamicTable
from tessera.kernels.random import normal
from tests.embedding.conftest import both_kinds

pytestmark = [both_kinds, pytest.mark.usefixtures("of_table")]

GROUPS = (Group("v", 4, 0.1), Group("w", 1, 0.01))


def config_of(**more):
    return DynamicTableConfig(**{"name": "user", "features": ("u",), "groups": GROUPS, "chunk_rows": 64, **more})


def test_first_values_depend_on_seed_table_group_and_id_alone(backend):
    ids = torch.randperm(300) * 31 - 4000
    one, other = DynamicTable(config_of(seed=5)), DynamicTable(config_of(seed=5))
    one.lookup(ids, 0)
    for part in ids.flip(0).split(7):
        other.lookup(part, 3)
    values = one.gather(one.lookup(ids, 0, training=False))
    assert torch.equal(values, other.gather(other.lookup(ids, 0, training=False)))
    for group, columns in zip(GROUPS, values.split([4, 1], dim=1), strict=True):
        static = TableConfig(f"user_{group.name}", group.dim, ("u",), group.init_std)
        torch.testing.assert_close(columns, group.init_std * normal(5, static.key, ids, group.dim))
    for different in (config_of(seed=6), config_of(seed=5, name="item")):
        table = DynamicTable(different)
        assert not torch.equal(values, table.gather(table.lookup(ids, 0)))


def test_nothing_is_inserted_counted_or_touched_outside_training(backend):
    table = DynamicTable(config_of(admission=Admission("exact", 2), ttl_seconds=10))
    ids = torch.arange(5)
    assert table.gather(table.lookup(ids, 0, training=False)).abs().sum() == 0
    table.lookup(ids[:3], 0, torch.full((3,), 2))
    before = table.stats()
    for _ in range(3):
        table.lookup(ids, 9, training=False)
    assert table.stats() == before
    assert table.lookup(ids[3:], 0).tolist() == [-1, -1], "evaluation did not count"
    assert table.expire(10) == 3, "evaluation did not touch"


@pytest.mark.parametrize("eviction", ["lru", pytest.param("lfu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl"])
def test_a_table_made_of_exported_rows_and_state_goes_on_bit_for_bit(backend, optimizer, eviction):
    config = config_of(
        optimizer=RowOptimizer(optimizer),
        max_rows=200,
        eviction=eviction,
        ttl_seconds=30,
        admission=Admission("sliding", 2, capacity=100),
    )
    table, twin = DynamicTable(config), None
    table.take_evicted()
    for step in range(30):
        if step == 15:
            twin = DynamicTable(config)
            twin.take_evicted()
            twin.import_state(table.export_state())
            for batch in table.export_rows(33):
                twin.import_rows(batch)
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 500, (90,), generator=generator).unique()
        grads = torch.randn((len(ids), 5), generator=generator)
        results = []
        for one in (table, twin) if twin else (table,):
            rows = one.lookup(ids, step // 3, torch.ones_like(ids))
            one.update(rows, grads)
            results.append((rows, one.gather(rows), one.expire(step, 50), sorted(one.take_evicted().tolist())))
        if twin:
            assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
            if step > 15:  # ids given up before the export are not part of it
                assert results[0][2:] == results[1][2:]
    assert table.stats()["evicted"] > 0
    totals = "rows", "new", "admitted", "rejected", "expired", "evicted"
    assert [table.stats()[name] for name in totals] == [twin.stats()[name] for name in totals]


@pytest.mark.parametrize("expected", [0, 150, 300, 1000])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_table_that_expects_rows_is_the_same_afterwards(backend, expected, in_place):
    options = {"max_rows": 400, "eviction": "lru", "optimizer": RowOptimizer("adam")}
    table, plain, ready = (DynamicTable(config_of(**options)) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    table.lookup(torch.arange(300) * 7, torch.randint(0, 90, (300,), generator=generator))
    ready.reserve(expected)
    for other in (plain, ready):
        for batch in table.export_rows(batch_rows=100):
            other.import_rows(batch if in_place else dataclasses.replace(batch, rows=None))
        other.import_state(table.export_state())
    assert ready.nbytes == plain.nbytes and ready.stats() == plain.stats()
    ready.reserve(10**9)  # a table with rows takes what it needs
    for begin in (1000, 2000, 3000):
        ids, grads = torch.arange(begin, begin + 100), torch.randn(100, 5, generator=generator)
        for other in (plain, ready):
            other.update(other.lookup(ids, 100 + begin), grads)
    rows = plain.rows_in_use()
    assert ready.rows_in_use().equal(rows) and ready.stats() == plain.stats()
    one, other = plain.read_rows(rows), ready.read_rows(rows)
    for name in ("ids", "values", "state", "last_seen", "count"):
        assert getattr(one, name).equal(getattr(other, name)), name


def test_import_replaces_known_ids_and_checks_counts(backend):
    table = DynamicTable(config_of(optimizer=RowOptimizer("adagrad")))
    table.lookup(torch.tensor([1, 2]), 50)
    ids = torch.tensor([2, 3])
    batch = RowBatch(ids, torch.rand(2, 5), torch.rand(2, 5), torch.tensor([7, 8]), torch.tensor([4, 1]))
    table.import_rows(batch)
    found = {int(i): n for out in table.export_rows() for n, i in enumerate(out.ids)}
    out = next(table.export_rows())
    order = [found[2], found[3]]
    assert len(table) == 3
    for name in ("values", "state", "last_seen", "count"):
        assert torch.equal(getattr(out, name)[order], getattr(batch, name)), name
    batch.count[0] = 0
    with pytest.raises(ValueError, match="table user: counts of imported rows must be 1 or more"):
        table.import_rows(batch)
    with pytest.raises(ValueError, match="counts must be 1 or more"):
        table.lookup(torch.tensor([9]), 0, torch.tensor([0]))


def test_expiry_looks_at_no_more_rows_than_its_budget(backend):
    table = DynamicTable(config_of(ttl_seconds=10))
    table.lookup(torch.arange(100), 0)
    table.lookup(torch.arange(50), 15)
    found = [table.expire(10, budget_rows=budget) for budget in (33, 33, 33, 1)]
    assert found == [0, 16, 33, 1] and len(table) == 50
    assert table.expire(25) == 50 and len(table) == 0 and table.expire(99) == 0
    assert DynamicTable(config_of()).expire(10**9) == 0, "nothing expires without ttl_seconds"


def test_the_walk_of_expiry_goes_on_in_a_table_made_from_the_state(backend):
    table, twin = (DynamicTable(config_of(ttl_seconds=10)) for _ in range(2))
    table.lookup(torch.arange(100), 0)
    table.expire(5, budget_rows=40)
    twin.import_state(table.export_state())
    for batch in table.export_rows():
        twin.import_rows(batch)
    for one in (table, twin):
        assert one.take_evicted().numel() == 0, "not noted before they are asked for"
        assert one.expire(10, budget_rows=10) == 10
        assert sorted(one.take_evicted().tolist()) == list(range(40, 50))


def test_every_id_may_bring_its_own_time(backend):
    table, ids = DynamicTable(config_of(ttl_seconds=10, admission=Admission("exact", 2))), torch.arange(6)
    table.lookup(ids, torch.arange(6), torch.tensor([2, 2, 2, 2, 1, 1]))
    assert len(table) == 4
    table.lookup(ids, torch.tensor([8, 0, 0, 0, 3, 9]))
    table.take_evicted()
    assert table.expire(11) == 1 and table.take_evicted().tolist() == [1]
    out = next(table.export_rows())
    last_seen = dict(zip(out.ids.tolist(), out.last_seen.tolist(), strict=True))
    assert last_seen == {0: 8, 2: 2, 3: 3, 4: 3, 5: 9}


def test_touched_rows_since_a_mark(backend):
    table, ids = DynamicTable(config_of()), torch.arange(10)
    rows = table.lookup(ids, 0)
    first = table.mark()
    table.update(rows[:3], torch.ones(3, 5))
    table.lookup(torch.arange(5, 12), 0)  # a look-up alone changes no values, but 10 and 11 are new
    second = table.mark()
    table.update(rows[2:5], torch.ones(3, 5))

    def touched(mark):
        return sorted(i for ids in table.touched_since(mark) for i in ids.tolist())

    assert touched(first) == [0, 1, 2, 3, 4, 10, 11] and touched(second) == [2, 3, 4]
    assert [batch.ids.tolist() for batch in table.export_rows(2, since=second)] == [[2, 3], [4]]
    assert touched(table.mark()) == []


def test_cleared_rows_are_used_again_and_start_afresh(backend):
    table = DynamicTable(config_of(ttl_seconds=10, optimizer=RowOptimizer("adagrad")))
    ids = torch.arange(100)
    first = table.gather(rows := table.lookup(ids, 0))
    table.update(rows, torch.ones(100, 5))
    assert table.expire(10) == 100
    assert table.gather(rows).abs().sum() == 0
    size = table.nbytes
    again = table.lookup(ids, 20, torch.full((100,), 3))
    assert sorted(again.tolist()) == sorted(rows.tolist()) and table.nbytes <= size
    out = next(table.export_rows())
    assert set(out.last_seen.tolist()) == {20} and set(out.count.tolist()) == {3} and out.state.abs().sum() == 0
    assert torch.equal(table.gather(again), first)


def test_evicted_ids_are_bounded_and_leave_out_those_that_came_back(backend):
    table = DynamicTable(config_of(max_rows=4, eviction="lru", evicted_kept=6))
    table.take_evicted()
    for step in range(6):
        table.lookup(torch.arange(step * 4, step * 4 + 4), step)
    table.lookup(torch.tensor([18]), 9)
    assert table.take_evicted().tolist() == [12, 13, 14, 15, 16, 17, 19, 23]
    assert table.take_evicted().numel() == 0


def test_readers_of_changes_do_not_take_from_each_other(backend):
    """One reader asks often, the other rarely; a table made from what the second knew goes on for it."""
    table = DynamicTable(config_of(ttl_seconds=10))
    assert table.evicted("rare") is None
    table.take_evicted("often")
    table.take_evicted("rare")
    since = table.mark()
    table.lookup(torch.arange(8), 0)
    table.lookup(torch.arange(4), 5)
    assert table.expire(10) == 4
    assert table.take_evicted("often").tolist() == [4, 5, 6, 7]
    table.mark()
    table.lookup(torch.tensor([5]), 12)
    assert table.evicted("rare").tolist() == [4, 6, 7]
    touched = torch.cat(list(table.touched_since(since)))
    assert touched.tolist() == [0, 1, 2, 3, 5]
    twin = DynamicTable(table.config)
    for batch in table.export_rows():
        twin.import_rows(batch)
    again = twin.restore_changes("rare", touched[1:], table.evicted("rare"))
    for one in (table, twin):
        assert one.expire(15) == 4
    assert torch.cat(list(twin.touched_since(again))).tolist() == [5]
    assert table.take_evicted("often").tolist() == [0, 1, 2, 3]
    for one in (table, twin):
        assert one.take_evicted("rare").tolist() == [0, 1, 2, 3, 4, 6, 7]
        assert one.evicted("rare").numel() == 0


def test_limits(backend):
    table = DynamicTable(config_of(max_rows=4))
    table.lookup(torch.arange(4), 0)
    with pytest.raises(
        TableFull, match="^table user: limit of 4 rows, 4 in use, 1 more wanted; raise max_rows"
    ) as error:
        table.lookup(torch.tensor([2, 7]), 1)
    assert "\n" not in str(error.value)
    table = DynamicTable(config_of(max_rows=4, eviction="lfu"))
    table.lookup(torch.arange(3), 0)
    with pytest.raises(TableFull, match="2 in use|3 in use, 3 more wanted by one batch"):
        table.lookup(torch.tensor([1, 2, 7, 8, 9]), 1)
    bytes_limit = config_of(max_bytes=20 * config_of().bytes_per_row)
    assert bytes_limit.row_limit == 20


def test_bytes_per_row_covers_what_a_large_table_uses():
    config = config_of(chunk_rows=1 << 16)
    table = DynamicTable(config)
    for ids in torch.arange(400_000).split(100_000):
        table.lookup(ids, 0)
    stats = table.stats()
    assert stats["bytes"] == table.nbytes and 0.6 * config.bytes_per_row < stats["bytes_per_row"] < config.bytes_per_row


def test_statistics_of_an_interval(backend):
    table = DynamicTable(config_of(max_rows=6, eviction="lru", ttl_seconds=5))
    table.lookup(torch.arange(6), 0)
    table.reset_interval()
    table.lookup(torch.arange(4, 8), 1)
    table.expire(5)
    wanted = {"rows": 4, "new": 2, "admitted": 2, "rejected": 0, "expired": 2, "evicted": 2}
    assert {name: table.stats(interval=True)[name] for name in wanted} == wanted
    assert table.stats()["new"] == 8


def test_empty_batches(backend):
    table, none = DynamicTable(config_of()), torch.empty(0, dtype=torch.int64)
    for training in (True, False):
        rows = table.lookup(none, 0, none, training=training)
        assert rows.shape == (0,) and table.gather(rows).shape == (0, 5) and table.gather(rows, none).shape == (0, 5)
    table.update(rows, torch.empty(0, 5))
    assert list(table.export_rows()) == [] and table.expire(9) == 0 and table.take_evicted().numel() == 0
