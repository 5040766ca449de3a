"""A set of tables is so many tables: the same values, state, times, counts and ids, bit for bit."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.embedding.config import Admission, DynamicTableConfig, Group, ScaleOptimizer
from tessera.embedding.errors import ConfigError, TableFull
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.table import DynamicTable
from tessera.embedding.table_set import TableSet
from tessera.kernels import records
from tessera.kernels.backend import available_backends
from tessera.kernels.records import Positions
from tessera.kernels.unique import positions_of, unique_tables
from tests.kernels.property_tests import HealthCheck, given, settings, st

NAMES = ("user", "item", "word", "none")
#: Groups and optimizers: plain, low precision beside plain, all formats, bf16 moments.
LAYOUTS = {
    "plain": ((Group("v", 16, 0.1), Group("w", 1, 0.0)), RowOptimizer("rowwise_adagrad", initial_accumulator=0.5)),
    "odd": ((Group("w", 1, 0.1), Group("v", 5, 0.1)), RowOptimizer("adam", weight_decay=0.01)),
    "mixed": ((Group("w", 1, 0.1), Group("v", 16, 0.1, "int8")), RowOptimizer("adagrad")),
    "half": ((Group("v", 16, 0.0, "bf16"), Group("u", 6, 0.1, "fp16", "nearest")), RowOptimizer("sgd")),
    "codes": ((Group("v", 7, 0.1, "int4"), Group("u", 16, 0.1, "int2", "nearest")), RowOptimizer("rowwise_adagrad")),
    "moments": ((Group("v", 9, 0.1), Group("w", 1, 0.1, "bf16")), RowOptimizer("adam", state_format="bf16")),
    "ftrl": ((Group("v", 8, 0.1), Group("w", 1, 0.1)), RowOptimizer("ftrl", l1=0.01)),
}


def configs(kind="plain"):
    """Tables of which each has its own spread of first values, learning rate and TTL."""
    groups, optimizer = LAYOUTS[kind]
    found = []
    for place, name in enumerate(NAMES):
        own = tuple(dataclasses.replace(group, init_std=group.init_std * (1 + place)) for group in groups)
        rate = dataclasses.replace(optimizer, lr=0.01 * 2**place)
        ttl = None if place == 1 else 30 + 20 * place
        found.append(DynamicTableConfig(name, (name,), own, rate, seed=3, ttl_seconds=ttl, chunk_rows=64))
    return found


def drawn(generator, most, ids):
    """Ids of a batch, with duplicates: flat int64 and bounds. Tables share ids, one table has none."""
    counts = [int(torch.randint(0, most + 1, (1,), generator=generator)) for _ in NAMES[:-1]] + [0]
    flat = torch.randint(-ids, ids, (sum(counts),), generator=generator)
    return flat, torch.tensor([0, *itertools.accumulate(counts)])


class Both:
    """A set, and as many tables as it has."""

    def __init__(self, tables):
        self.set = TableSet(tables)
        self.tables = [DynamicTable(table) for table in tables]

    def step(self, flat, bounds, now, generator, direct=False):
        ids, inverse, counts, ends = unique_tables(flat, bounds)
        rows = self.set.lookup(ids, ends, now, counts)
        values = self.set.gather(rows, inverse)
        grads = torch.randn((ids if direct else flat).numel(), self.set.width, generator=generator)
        self.set.update(rows, grads, None if direct else Positions(*positions_of(inverse, counts)))
        for t, table in enumerate(self.tables):
            own, mine = slice(*bounds[t : t + 2].tolist()), slice(*ends[t : t + 2].tolist())
            old = table.lookup(ids[mine], now, counts[mine])
            assert table.gather(old, inverse[own] - mine.start).equal(values[own])
            if direct:
                table.update(old, grads[mine])
            else:
                table.update(old, grads[own], inverse[own] - mine.start)

    def expire(self, now):
        assert self.set.expire(now) == sum(table.expire(now) for table in self.tables)

    def check(self):
        for t, table in enumerate(self.tables):
            assert same(contents(self.set.export_rows(t)), contents(table.export_rows())), t
            assert int(self.set.rows_of[t]) == len(table)
            for name, number in zip(("new", "admitted", "rejected", "expired"), self.set.counters[:4, t], strict=True):
                assert table.stats()[name] == int(number), name
        assert len(self.set) == sum(len(table) for table in self.tables)


def contents(batches):
    """All that belongs to rows but their numbers, in order of ids."""
    found = {}
    for batch in batches:
        for name, part in vars(batch).items():
            if part is not None and name != "rows":
                found.setdefault(name, []).append(part)
    if not found:
        return {"ids": torch.empty(0, dtype=torch.int64)}
    whole = {name: torch.cat(parts) for name, parts in found.items()}
    order = whole["ids"].argsort()
    return {name: part[order] for name, part in whole.items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(ours[name].equal(part) for name, part in theirs.items())


def live(kind, seed, steps, most=40, ids=60):
    generator = torch.Generator().manual_seed(seed)
    both = Both(configs(kind))
    for step in range(steps):
        both.step(
            *drawn(generator, most, ids), now=20 * step - 5 * (step % 3), generator=generator, direct=step % 4 == 3
        )
        if step % 3 == 2:
            both.expire(20 * step)
    both.check()
    return both


@pytest.mark.parametrize("kind", LAYOUTS)
def test_equals_so_many_tables(backend, kind):
    assert len(live(kind, 0, 8).set) > 50


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(list(LAYOUTS)), seed=st.integers(0, 999), steps=st.integers(1, 6), ids=st.integers(1, 300))
def test_equals_so_many_tables_whatever_the_batches(kind, seed, steps, ids):
    live(kind, seed, steps, most=100, ids=ids)


@pytest.mark.parametrize("kind", ["plain", "mixed", "moments"])
def test_threads_change_nothing(kind):
    """Batches of more rows than a thread takes alone, so that both work."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([contents(live(kind, 1, 3, 20_000, 15_000).set.export_rows(t)) for t in range(3)])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert same(one, other) and len(one["ids"]) > 100


def test_rows_lie_in_chunks_that_double(monkeypatch, backend):
    """Beyond the chunks that double, where all are alike."""
    monkeypatch.setattr(records, "chunk_rows", lambda reserved: 4 if not reserved else min(reserved, 16))
    both = live("plain", 2, 6, 60, 100)
    assert [len(chunk) for chunk in both.set._chunks][:6] == [4, 4, 8, 16, 16, 16]


def test_many_empty_tables_cost_little():
    groups, optimizer = LAYOUTS["plain"]
    tables = [DynamicTableConfig(f"t{i}", ("f",), groups, optimizer) for i in range(200)]
    found = TableSet(tables)
    found.lookup(torch.arange(200), torch.arange(201), 1)
    assert len(found) == 200 and found.rows_of.eq(1).all()
    assert found.reserved_bytes + found.map.nbytes < 8 << 20


def test_finding_changes_nothing(backend):
    both = live("plain", 3, 3)
    ids, bounds = torch.arange(-70, 70).repeat(4), torch.arange(5) * 140
    before = [contents(both.set.export_rows(t)) for t in range(4)]
    rows = both.set.find(ids, bounds)
    assert ids[:140][rows[:140] >= 0].equal(before[0]["ids"]) and len(before[0]["ids"]) > 10
    assert rows[420:].eq(-1).all()
    assert all(same(contents(both.set.export_rows(t)), before[t]) for t in range(4))
    both.check()


def test_a_mark_is_noted_and_nothing_else_changes(backend):
    both = live("plain", 4, 2)
    rows = both.set.find(torch.arange(-60, 60), torch.tensor([0, 0, 120, 120, 120]))
    before = contents(both.set.export_rows(1))
    both.set.update(rows, torch.zeros(120, 17), mark=7)
    meta = torch.cat([meta for _, meta in both.set._walk()])
    marks = (
        torch.cat([chunk.view(torch.int64)[:, both.set.layout.meta_at // 8 + 3] for chunk in both.set._chunks]) >> 32
    )
    assert sorted(marks.unique().tolist()) == [0, 7] and int(marks.eq(7).sum()) == len(before["ids"])
    assert meta[:, 3].max() == 2
    assert same(contents(both.set.export_rows(1)), before)


def test_a_limit_is_a_table_s_own():
    tables = configs()
    tables[1] = dataclasses.replace(tables[1], max_rows=3)
    found = TableSet(tables)
    found.lookup(torch.arange(13), torch.tensor([0, 10, 13, 13, 13]), 1)
    with pytest.raises(TableFull, match="table item: limit of 3 rows, 3 in use, 1 more wanted"):
        found.lookup(torch.tensor([0, 99]), torch.tensor([0, 1, 2, 2, 2]), 1)
    with pytest.raises(ValueError, match="counts must be 1 or more"):
        found.lookup(torch.tensor([77]), torch.tensor([0, 1, 1, 1, 1]), 1, torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": (Group("v", 8, 0.1),)}, "table item: groups is .*; expected that of table user"),
        ({"optimizer": RowOptimizer("sgd")}, "table item: optimizer is .*; expected that of table user"),
        ({"seed": 4}, "table item: seed is 4; expected that of table user, 3"),
        ({"admission": Admission("exact", 2)}, "table item: admission.kind is exact; expected in a set of tables none"),
        ({"max_rows": 9, "eviction": "lru"}, "table item: eviction is lru; expected in a set of tables raise"),
    ],
)
def test_refused_tables(change, message):
    tables = configs()
    with pytest.raises(ConfigError, match=message):
        TableSet([tables[0], dataclasses.replace(tables[1], **change)])


def test_learned_scales_are_refused():
    group = Group("v", 8, 0.1, "int8", learned=ScaleOptimizer())
    with pytest.raises(ConfigError, match=r"table t: groups.learned is \[.*\]; expected in a set of tables \[\]"):
        TableSet([DynamicTableConfig("t", ("f",), (group,))])


class Count(TorchDispatchMode):
    """Counts the operations that torch carries out."""

    def __init__(self):
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
@pytest.mark.parametrize("tables", [1, 26, 200])
def test_a_step_takes_as_many_operations_for_any_number_of_tables(tables):
    groups, optimizer = LAYOUTS["plain"]
    found = TableSet([DynamicTableConfig(f"t{i}", ("f",), groups, optimizer) for i in range(tables)])
    bounds, counted = torch.arange(tables + 1) * 50, []
    for ids in (torch.arange(50).repeat(tables), torch.arange(50).repeat(tables), torch.arange(25, 75).repeat(tables)):
        with Count() as count:
            unique, inverse, counts, ends = unique_tables(ids, bounds)
            rows = found.lookup(unique, ends, 1, counts)
            values = found.gather(rows, inverse)
            found.update(rows, values, Positions(*positions_of(inverse, counts)))
        counted.append(count.ops)
    assert counted[1] <= 10 and counted[2] <= 60, counted  # growth of map and chunks included
