"""A set of tables is so many tables: the same values, state, times, counts and ids, bit for bit."""

import dataclasses
import itertools
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.embedding.config import Admission, DynamicTableConfig, Group, ScaleOptimizer
from tessera.embedding.errors import ConfigError, TableFull
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.rows_of_tables import RowsOfTables
from tessera.embedding.set_table import SetTable
from tessera.embedding.table import COUNTERS, DynamicTable
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
        self.parts = [SetTable(self.set, number) for number in range(len(tables))]
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
        for part, table in zip(self.parts, self.tables, strict=True):
            assert part.expire(now) == table.expire(now)

    def check(self):
        """Row numbers are equal, too."""
        for part, table in zip(self.parts, self.tables, strict=True):
            assert same(contents(part.export_rows()), contents(table.export_rows())), part.config.name
            ours, theirs = part.stats(), table.stats()
            assert all(ours[name] == theirs[name] for name in ("rows", *COUNTERS))
        assert len(self.set) == sum(len(table) for table in self.tables)


def contents(batches):
    """All that belongs to rows."""
    found = {}
    for batch in batches:
        for name, part in vars(batch).items():
            if part is not None:
                found.setdefault(name, []).append(part)
    if not found:
        return {"ids": torch.empty(0, dtype=torch.int64)}
    return {name: torch.cat(parts) for name, parts in found.items()}


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


#: Of tables of one set: what differs between them.
LIVES = [
    {"admission": Admission("exact", 3)},
    {"max_rows": 32, "eviction": "lru"},
    {"max_rows": 30, "eviction": "lfu", "admission": Admission("sliding", 2, capacity=50)},
    {"admission": Admission("probabilistic", 2), "max_rows": 30, "eviction": "lru", "evicted_kept": 20},
]


@pytest.mark.parametrize("seed", range(3))
def test_equals_so_many_tables_of_which_each_has_its_own_life(backend, seed):
    """Admission, limits, eviction, periods, first values, marks, evicted ids, expiry with a budget, and what is
    saved."""
    tables = []
    for table, life in zip(configs("odd" if seed else "mixed"), LIVES, strict=True):
        optimizer = dataclasses.replace(table.optimizer, old_rows_factor=0.25 if seed == 1 else 1.0)
        tables.append(dataclasses.replace(table, optimizer=optimizer, **life))
    both, generator = Both(tables), torch.Generator().manual_seed(seed)
    everything = [both.parts, both.tables]
    marks = [[table.mark() for table in side] for side in everything]
    for side in everything:
        side[0].init_values = torch.arange(side[0].config.width) / 8
        for table in side:
            table.take_evicted()
    for step in range(12):
        counts = [int(torch.randint(0, 30, (1,), generator=generator)) for _ in tables]
        flat, bounds = torch.randint(-40, 40, (sum(counts),), generator=generator), [0, *itertools.accumulate(counts)]
        both.step(flat, torch.tensor(bounds), 20 * step, generator, direct=step % 4 == 3)
        for side in everything:
            for table in side:
                if step % 3 == 1:
                    table.expire(20 * step, 25 if seed else None)
                if step == 4:
                    table.begin_period()
        both.check()
        if step == 5:
            marks = [[table.mark() for table in side] for side in everything]
    for ours, theirs, *since in zip(*everything, *marks, strict=True):
        touched = [
            torch.cat([torch.arange(0), *table.touched_since(mark)])
            for table, mark in zip((ours, theirs), since, strict=True)
        ]
        assert touched[0].equal(touched[1])
        assert ours.take_evicted().equal(theirs.take_evicted())
        state, expected = ours.export_state(), theirs.export_state()
        assert state.keys() == expected.keys()
        assert all(value.equal(expected[name]) for name, value in state.items()), ours.config.name
    assert min(part.stats()["evicted"] for part in both.parts[1:]) > 0
    assert min(part.stats()["rejected"] for part in (both.parts[0], *both.parts[2:])) > 0


def test_tables_share_what_is_kept_for_their_snapshots():
    both, generator = live("plain", 5, 3), torch.Generator().manual_seed(5)
    expected = [contents(part.export_rows()) for part in both.parts]
    snapshots = [part.snapshot() for part in both.parts]
    assert (
        len({id(one.kept) for one in snapshots})
        == 1
        != len({id(one.kept) for one in (snapshots[0], both.parts[0].snapshot())})
    )
    for step in range(3, 6):
        both.step(*drawn(generator, 40, 90), now=20 * step, generator=generator)
        both.expire(20 * step)
    for one, was in zip(snapshots, expected, strict=True):
        rows, ids = one.rows_in_use()
        assert ids.equal(was["ids"]) and (not len(ids) or same(contents([one.read(rows)]), was))
        one.release()
    both.check()


def test_many_tables_are_saved_and_go_on_in_another_set():
    """Row numbers, free rows and order are those of before, whatever the order of tables."""
    both, generator = live("mixed", 6, 5), torch.Generator().manual_seed(6)
    other = Both(configs("mixed"))
    for part, table, theirs in zip(other.parts, other.tables, both.tables, strict=True):
        for one in (part, table):
            one.reserve(len(theirs))
            for batch in theirs.export_rows(7):
                one.import_rows(batch)
            one.import_state(theirs.export_state())
    other.check()
    for step in range(5, 8):
        now = 20 * step
        other.step(*drawn(generator, 40, 90), now=now, generator=generator)
        other.expire(now)
        other.check()


@pytest.mark.parametrize("kind", ["plain", "mixed", "moments"])
def test_threads_change_nothing(kind):
    """Batches of more rows than a thread takes alone, so that both work."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([contents(part.export_rows()) for part in live(kind, 1, 3, 20_000, 15_000).parts[:3]])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert same(one, other) and len(one["ids"]) > 100


def test_rows_lie_in_chunks_that_double(monkeypatch, backend):
    """Beyond the chunks that double, where all are alike."""
    monkeypatch.setattr(records, "chunk_rows", lambda reserved: 4 if not reserved else min(reserved, 16))
    both = live("plain", 2, 6, 60, 100)
    assert [len(chunk) for chunk in both.set.store.chunks][:6] == [4, 4, 8, 16, 16, 16]


def test_many_empty_tables_cost_little():
    groups, optimizer = LAYOUTS["plain"]
    tables = [DynamicTableConfig(f"t{i}", ("f",), groups, optimizer) for i in range(200)]
    found = TableSet(tables)
    found.lookup(torch.arange(200), torch.arange(201), 1)
    assert len(found) == 200 and found.rows_in_use == [1] * 200
    assert found.reserved_bytes + found.map.nbytes < 8 << 20


def test_finding_changes_nothing(backend):
    both = live("plain", 3, 3)
    ids, bounds = torch.arange(-70, 70).repeat(4), torch.arange(5) * 140
    before = [contents(part.export_rows()) for part in both.parts]
    rows = both.set.find(ids, bounds)
    assert ids[:140][rows[:140] >= 0].equal(before[0]["ids"].sort().values) and len(before[0]["ids"]) > 10
    assert rows[420:].eq(-1).all()
    assert all(same(contents(part.export_rows()), was) for part, was in zip(both.parts, before, strict=True))
    both.check()


def test_a_mark_is_noted_and_nothing_else_changes(backend):
    both = live("plain", 4, 2)
    part = both.parts[1]
    before, mark = contents(part.export_rows()), part.mark()
    rows = both.set.find(torch.arange(-60, 60), torch.tensor([0, 0, 120, 120, 120]))
    both.set.update(rows, torch.zeros(120, 17))
    assert sorted(torch.cat(list(part.touched_since(mark))).tolist()) == sorted(before["ids"].tolist())
    assert not any(len(ids) for other in (both.parts[0], both.parts[2]) for ids in other.touched_since(mark))
    assert same(contents(part.export_rows()), before)


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
        (
            {"groups": (Group("v", 16, 0.1, "int8", learned=ScaleOptimizer()), Group("w", 1, 0.0))},
            "table item: groups is .*; expected that of table user",
        ),
    ],
)
def test_refused_tables(change, message):
    tables = configs()
    with pytest.raises(ConfigError, match=message):
        TableSet([tables[0], dataclasses.replace(tables[1], **change)])


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
    assert counted[1] <= 10 and counted[2] <= 80, counted  # growth of map and chunks included


@pytest.mark.parametrize("tables", [1, 40])
def test_freed_rows_are_taken_by_as_many_operations_for_any_number_of_tables(tables):
    """Of each table its last freed first, as by a list; then new ones. An undone take gives them again."""
    store = TableSet([DynamicTableConfig("t", ("f",), *LAYOUTS["plain"])]).store
    rows, stacks, draw = RowsOfTables(tables, store), [[] for _ in range(tables)], random.Random(tables)
    taken, ops = [[] for _ in range(tables)], []
    for turn in range(12):
        wanted = [draw.randrange(6) for _ in range(tables)]
        of = torch.arange(tables).repeat_interleave(torch.tensor(wanted))
        if turn % 3 == 0:
            before = rows.state()
            rows.take(of, wanted, limited=False)
            rows.restore(before)
        with Count() as count:
            found = rows.take(of, wanted, limited=False)
        ops.append(count.ops)
        for table, own in enumerate(part.tolist() for part in found.split(wanted)):
            again = min(len(stacks[table]), len(own))
            assert own[:again] == [stacks[table].pop() for _ in range(again)]
            taken[table] += own
            gone = [taken[table].pop(draw.randrange(len(taken[table]))) for _ in range(len(taken[table]) // 2)]
            rows.free.give_back(table, torch.tensor(gone, dtype=torch.int64))
            stacks[table] += gone
        assert [rows.free.rows(table).tolist() for table in range(tables)] == stacks
        everywhere = [row for rows_of in (*taken, *stacks) for row in rows_of]
        assert len(set(everywhere)) == len(everywhere) == sum(rows.ends)
    assert max(ops[1:]) <= 32, ops
