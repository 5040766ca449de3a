"""A table on the host with a cache against the same table without one: every bit alike, whatever the batches are."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tessera.embedding.cached_table import CachedTable, make_table
from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.errors import CacheFull, ConfigError, TableFull
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.table import DynamicTable
from tessera.kernels.backend import backend as current
from tessera.kernels.unique import unique_inverse
from tests.embedding import test_formats

WIDTH = 7
FP32 = (Group("v", 6, 0.3), Group("w", 1, 0.1))
KINDS = {
    **{name: (FP32, RowOptimizer(name, lr=0.1)) for name in ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")},
    "old rows": (FP32, RowOptimizer("adagrad", lr=0.1, old_rows_factor=0.25)),
    **test_formats.CONFIGS,
    "decay": (FP32, RowOptimizer("adam", lr=0.1, decay=0.5)),
    "decay by count": (test_formats.CONFIGS["learned"][0], RowOptimizer("sgd", lr=0.1, decay=2, decay_count_power=1)),
    "old rows learned": (test_formats.CONFIGS["learned"][0], RowOptimizer("sgd", lr=0.1, old_rows_factor=0.25)),
}
POOL = [0, 1, -1, 2**63 - 1, -(2**63), *range(1000, 1024), *range(-30, -20)]

#: between two steps: nothing (the second batch is brought during the first step), or what looks at the table
PAUSES = ["expire", "export", "evaluate", "mark", "take in", "move", "host step", "period", "snapshot", "snapshot"]
pauses = st.sampled_from([*[None] * 20, *PAUSES])
admissions = [Admission("exact", 2), Admission("sliding", 2, 64), Admission("probabilistic", 2)]
lives = st.fixed_dictionaries(
    {
        "eviction": st.sampled_from(["lru", "lfu"]),
        "admission": st.sampled_from([Admission(), Admission(), Admission(), *admissions]),
        "batch": st.sampled_from([3, 8, 8, 16]),  # ids of the largest one; most are as large
        "limit": st.sampled_from([None, 0, 3, 8]),  # of the table: so many rows more than that
        "steps": st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 20), pauses), min_size=10, max_size=30),
        "spare": st.sampled_from([0, 0, 0, 1, 5]),  # rows of the cache beyond two batches
    }
)


def draw_ids(seed, size):
    """Distinct ids, `size` or, in every fourth batch, fewer; then some of them again."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 4 == 0:
        size = int(torch.randint(0, size + 1, (), generator=generator))
    ids = torch.tensor(POOL)[torch.randperm(len(POOL), generator=generator)[:size]]
    return torch.cat([ids, ids[torch.randint(0, max(1, size), (size // 2,), generator=generator)]])


class Batch:
    def __init__(self, ids, now, seed):
        self.ids, self.inverse, self.counts = unique_inverse(ids)
        self.now = now
        generator = torch.Generator().manual_seed(seed)
        self.grads, self.second = torch.randn((2, len(ids), WIDTH), generator=generator)


def train(where, rows, batch, learns):
    """The device's part of a step. Returns what it has read."""
    values = [where.gather(rows, batch.inverse)]
    if learns:
        update = where.begin_update(rows, batch.grads, batch.inverse, 0.1, batch.ids)
        values.append(update.gather(batch.inverse))
        update.learn(batch.second * values[-1], batch.inverse)
    elif len(batch.inverse):
        where.update(rows, batch.grads, batch.inverse, 0.1, batch.ids)
    return values


def everything(table):
    rows = [vars(part) for part in table.export_rows(5)]
    names = [name for name, column in rows[0].items() if column is not None] if rows else []
    columns = {name: torch.cat([part[name] for part in rows]) for name in names}
    marked = torch.cat([torch.empty(0, dtype=torch.int64), *table.touched_since(1)])
    return columns | table.export_state() | {"touched": marked, "counters": torch.tensor(list(table.stats().values()))}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape, name
        parts = (part[name].clone(memory_format=torch.contiguous_format) for part in (one, other))
        mine, others = (part.view(-1).view(torch.uint8) for part in parts)
        assert torch.equal(mine, others), name


def moved(table):
    """A new table made of what this one exports."""
    new = type(table)(table.config, "cpu")
    new.take_evicted()
    new.import_state(table.export_state())
    for part in table.export_rows(4):
        new.import_rows(part)
    return new


def pause(table, what, batch):
    """What happens between two steps; returns the table to go on with, and what it has said."""
    if what == "expire":
        return table, [table.expire(batch.now, 7)]
    if what == "export":
        return table, [everything(table), table.take_evicted().sort().values]
    if what == "evaluate":
        return table, [table.gather(table.lookup(batch.ids, 0, training=False), batch.inverse)]
    if what == "period":
        table.begin_period()
    if what == "mark":
        return table, [table.mark()]
    if what == "take in":  # rows as they are, of known ids
        for part in list(table.export_rows(3))[:2]:
            part.rows, part.count = None, part.count + 1
            table.import_rows(part)
    if what == "host step":  # a step by those methods that do not know of a cache
        rows = table.lookup(batch.ids, batch.now, batch.counts)
        return table, train(table, rows, batch, table.config.learns_scales)
    if what == "move":
        return moved(table), []
    return table, []


def of_snapshot(snapshot):
    """The rows of the moment, read in pieces."""
    rows, ids = snapshot.rows_in_use()
    parts = [vars(snapshot.read(piece)) for piece in rows.split(7)]
    names = [name for name, column in parts[0].items() if column is not None]
    return {"rows in use": rows, "ids in use": ids, **{n: torch.cat([part[n] for part in parts]) for n in names}}


def ids_of_two_batches(batches):
    """The distinct ids, at most, of two batches in a row: what a cache must hold."""
    distinct = [set(batch.ids.tolist()) for batch in batches]
    return max(1, *(len(a | b) for a, b in zip(distinct, distinct[1:], strict=False)))


def check(life):
    groups, optimizer = KINDS[life["kind"]]
    config = DynamicTableConfig(
        "t", ("f",), groups, optimizer, seed=3, chunk_rows=4, ttl_seconds=40, admission=life["admission"],
        max_rows=None if life["limit"] is None else life["limit"] + life["batch"], eviction=life["eviction"],
    )  # fmt: skip
    steps, now = [], 1000
    for seed, seconds, what in life["steps"]:
        now += seconds
        steps.append((Batch(draw_ids(seed, life["batch"]), now, seed), what))
    capacity = ids_of_two_batches([batch for batch, _ in steps]) + life["spare"]
    plain, cached = DynamicTable(config), make_table(dataclasses.replace(config, cache_rows=capacity), "cpu")
    assert isinstance(cached, CachedTable)
    learns, coming = config.learns_scales, None
    plain.take_evicted(), cached.take_evicted()
    moments = []
    for number, (batch, what) in enumerate(steps):
        rows = plain.lookup(batch.ids, batch.now, batch.counts)
        where, slots = coming or cached.bring(batch.ids, batch.now, batch.counts)
        cached.prefetched, coming = 0, None
        assert torch.equal(slots < 0, rows < 0)
        if what is None and number + 1 < len(steps):  # the host is one batch ahead of the device
            ahead = steps[number + 1][0]
            coming = cached.bring(ahead.ids, ahead.now, ahead.counts)
            cached.prefetched = 1
        for one, other in zip(train(plain, rows, batch, learns), train(where, slots, batch, learns), strict=True):
            assert torch.equal(one, other)
        if coming is None and what == "snapshot":
            for one, other in moments:
                same(of_snapshot(one), of_snapshot(other))
                one.release(), other.release()
            moments = [(plain.snapshot(), cached.snapshot())]
        elif coming is None:
            plain, said = pause(plain, what, batch)
            cached, said_too = pause(cached, what, batch)
            for one, other in zip(said, said_too, strict=True):
                pair = (one, other) if isinstance(one, dict) else ({"": torch.as_tensor(x)} for x in (one, other))
                same(*pair)
    same(everything(plain), everything(cached))
    for one, other in moments:
        same(of_snapshot(one), of_snapshot(other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lives_each", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_every_bit_is_that_of_the_table_without_cache(backend, kind, lives_each):
    limits = settings(
        max_examples=lives_each if current() == "cpp" else max(1, lives_each // 4),
        deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    limits(given(life=lives)(lambda life: check({**life, "kind": kind})))()


def small(rows, **more):
    return CachedTable(DynamicTableConfig("user", ("u",), FP32, seed=1, chunk_rows=4, cache_rows=rows, **more), "cpu")


def test_rows_stay_while_there_is_room():
    table = small(8)
    for _ in range(5):
        table.bring(torch.arange(8), 0)
    assert table.cache_stats() == {"hits": 32, "misses": 8, "written_back": 0}
    assert table.cache_stats() == {"hits": 0, "misses": 0, "written_back": 0}


def test_what_was_not_wanted_lately_goes_first():
    """Ids 0 to 3 come in every second batch, the others once: the hand passes the former."""
    table = small(16)
    for step in range(40):
        ids = torch.arange(4) if step % 2 else torch.arange(100 + 4 * step, 104 + 4 * step)
        table.bring(ids, step)
    assert table.cache_stats()["hits"] == 4 * 19


def test_a_table_smaller_than_its_cache_takes_little_of_it():
    table = small(1 << 20)
    table.bring(torch.arange(10), 0)
    assert table.cache.nbytes == 10 * table.config.stored_bytes
    assert sum(chunk.shape[0] for chunk in table.cache.store.groups[0].chunks) <= 1 << 16


def test_written_back_once_when_nothing_changes():
    table = small(8)
    where, slots = table.bring(torch.arange(5), 0)
    where.update(slots, torch.ones(5, WIDTH), None, 0.1, None)
    for _ in range(3):
        table.gather(table.lookup(torch.arange(5), 0, training=False))
    assert table.cache_stats()["written_back"] == 5


def test_rows_may_be_read_between_the_halves_of_a_step():
    table, plain = small(8), DynamicTable(small(8).config)
    ids, grads = torch.arange(5), torch.ones(5, WIDTH)
    (where, slots), rows = table.bring(ids, 0), plain.lookup(ids, 0)
    same(everything(table), everything(plain))
    where.update(slots, grads, None, 0.1, None)
    plain.update(rows, grads, None, 0.1)
    same(everything(table), everything(plain))


def test_two_batches_that_do_not_fit_say_what_they_need():
    table = small(8)
    table.bring(torch.arange(5), 0)
    with pytest.raises(CacheFull) as error:
        table.bring(torch.arange(3, 9), 0)
    assert str(error.value) == (
        "table user: two batches in a row need 9 rows in the cache, which has 8; "
        "raise cache_rows or cache_bytes, or make the batch smaller"
    )
    with pytest.raises(CacheFull, match="need 9 rows in the cache, which has 8;"):
        small(8).bring(torch.arange(9), 0)


def test_the_limit_of_the_table_is_still_that_of_the_table():
    table = small(8, max_rows=4)
    with pytest.raises(TableFull, match="table user: limit of 4 rows"):
        table.bring(torch.arange(5), 0)


def test_nothing_else_may_ask_while_a_batch_is_ahead():
    table = small(8, ttl_seconds=10)
    table.bring(torch.arange(3), 0)
    table.prefetched = 1
    for call in (
        lambda: table.expire(100),
        lambda: list(table.export_rows()),
        lambda: table.lookup(torch.arange(3), 0, training=False),
        table.snapshot,
        table.begin_period,
        table.export_state,
        table.mark,
    ):
        with pytest.raises(AssertionError, match="table user: asked while the batch of a later step is prefetched"):
            call()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cache_rows": 0}, "table user: cache_rows is 0; expected at least 1"),
        ({"cache_bytes": 20}, "table user: cache_bytes is 20; expected at least the 36 bytes of one row, or null"),
    ],
)
def test_a_size_that_cannot_work(more, message):
    with pytest.raises(ConfigError) as error:
        DynamicTableConfig("user", ("u",), FP32, **more)
    assert str(error.value) == message


def test_the_tighter_size_counts():
    config = DynamicTableConfig("user", ("u",), FP32, cache_rows=10, cache_bytes=36 * 7 + 35)
    assert config.cache_limit == 7 and dataclasses.replace(config, cache_rows=3).cache_limit == 3
    assert dataclasses.replace(config, cache_bytes=None, cache_rows=None).cache_limit is None
    assert type(make_table(dataclasses.replace(config, cache_bytes=None, cache_rows=None), "cpu")) is DynamicTable
