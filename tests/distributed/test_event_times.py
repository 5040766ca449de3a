"""Rows are touched with the time of their own latest event, on every path to their owners and any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.event_times import (
    MAX_AGE,
    MAX_COUNT,
    MAX_TIME,
    MIN_TIME,
    ages_at,
    latest,
    packed,
    times_of_values,
    unpacked,
)
from tessera.distributed.sharding import shard
from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tests.ranks import on_ranks

IDS, ROWS, STEPS, NOW = ["a", "b", "c"], 12, 5, 1_800_000_000
GROUPS = (Group("v", 4, 0.5),)
#: How ids reach their owners: as rows, as bags (some with weights), before the step.
PATHS = {
    "rows": {},
    "bags": {"bag_tables": ("bc",), "weighted": True},
    "bags ahead": {"bag_tables": ("a", "bc"), "ahead": True},
    "cache": {"cache_rows": 60, "ahead": True, "bag_tables": ("a",)},
}


def batch_of(step: int, rows: slice, *, weighted: bool) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """Some rows of a global batch and the times of its events: from two years before the batch to a day after it."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (3, ROWS), generator=generator, dtype=torch.int32)
    items = torch.randint(0, 40, (int(lengths.sum()),), generator=generator) * 7919 - 2**60
    weights = torch.rand(len(items), generator=generator)
    times = NOW + step - torch.randint(-86_400, 2 * 365 * 86_400, (ROWS,), generator=generator)
    bags, weights_of_bags = items.split(lengths.flatten().tolist()), weights.split(lengths.flatten().tolist())
    chosen = [feature * ROWS + row for feature in range(3) for row in range(ROWS)[rows]]
    ids = KeyedJaggedTensor(
        IDS,
        torch.cat([bags[i] for i in chosen]),
        lengths=lengths[:, rows].flatten(),
        weights=torch.cat([weights_of_bags[i] for i in chosen]) if weighted else None,
        stride=len(range(ROWS)[rows]),
    )
    return ids, times[rows]


def last_seen(process, weighted=False, ahead=False, cache_rows=None, bag_tables=()):
    """(table, id) -> time and count of this rank's rows after some steps."""
    common = {"seed": 3, "admission": Admission("exact", 2), "cache_rows": cache_rows, "chunk_rows": 64}
    optimizer = RowOptimizer("sgd", lr=0.1)
    configs = [DynamicTableConfig(n, tuple(n), GROUPS, optimizer, **common) for n in ("a", "bc")]
    tables = DynamicTables(configs, IDS, 100, bag_tables=bag_tables)
    model = torch.nn.ModuleDict({"tables": tables})
    model.forward = lambda ids: tables(ids)["v"]
    shard(model, tables, process, ROWS)
    share = ROWS // process.world_size
    mine = slice(process.rank * share, (process.rank + 1) * share)
    for step in range(STEPS):
        ids, times = batch_of(step, mine, weighted=weighted)
        if ahead:
            tables.begin(ids, times)
            tables.bring(NOW + step)
        tables.begin_step(NOW + step, times=times)
        model.forward(ids).sum().backward()
    return {
        (name, int(i)): (int(seen), int(count))
        for name, table in tables.owned().items()
        for rows in table.export_rows()
        for i, seen, count in zip(rows.ids, rows.last_seen, rows.count, strict=True)
    }


def expected() -> dict[tuple[str, int], tuple[int, int]]:
    """The same by hand: an id gets its row when it is seen for the second time, and its count begins in that batch."""
    rows, waiting = {}, {}
    for step in range(STEPS):
        ids, times = batch_of(step, slice(0, ROWS), weighted=False)
        seen: dict[tuple[str, int], list[int]] = {}
        for feature, bags in ids.to_dict().items():
            for row, bag in enumerate(bags.to_dense()):
                for i in bag.tolist():
                    seen.setdefault(("a" if feature == "a" else "bc", i), []).append(int(times[row]))
        for key, its_times in seen.items():
            latest, count = min(max(its_times), NOW + step), len(its_times)
            if key in rows:
                rows[key] = (max(rows[key][0], latest), rows[key][1] + count)
                continue
            waiting[key] = waiting.get(key, 0) + count
            if waiting[key] >= 2:
                rows[key] = (latest, count)
    return rows


def paths_of(process) -> dict[str, dict]:
    return {name: last_seen(process, **path) for name, path in PATHS.items()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_have_the_time_of_their_latest_event(world):
    results = on_ranks(world, paths_of)
    for name in PATHS:
        found = {key: row for result in results for key, row in result[name].items()}
        assert found == expected(), name
        assert sum(len(result[name]) for result in results) == len(found)


def test_without_times_rows_have_the_time_of_the_batch(process):
    tables = DynamicTables([DynamicTableConfig("a", ("a",), GROUPS, RowOptimizer("sgd"))], ["a"], 100)
    model = torch.nn.ModuleDict({"tables": tables})
    model.forward = lambda ids: tables(ids)["v"]
    shard(model, tables, process, 4)
    ids = KeyedJaggedTensor(["a"], torch.tensor([5, 6, 5]), lengths=torch.tensor([1, 0, 2, 0], dtype=torch.int32))
    tables.begin_step(NOW, times=torch.tensor([NOW - 9, 0, NOW - 7, 0]))
    model.forward(ids).sum().backward()
    tables.begin_step(NOW - 1)  # the times of the step before are not those of this one
    model.forward(ids).sum().backward()
    (rows,) = tables.owned()["a"].export_rows()
    assert dict(zip(rows.ids.tolist(), rows.last_seen.tolist(), strict=True)) == {5: NOW - 1, 6: NOW - 1}


def test_counts_and_times_come_back_from_what_travels():
    counts = torch.tensor([1, 2, MAX_COUNT, MAX_COUNT + 5, 7])
    times = torch.tensor([0, MAX_TIME, MIN_TIME, -1, 2**62])
    again, timed = unpacked(packed(counts, times))
    assert again.tolist() == [1, 2, MAX_COUNT, MAX_COUNT, 7] and timed.tolist() == [0, MAX_TIME, MIN_TIME, -1, MAX_TIME]
    again, timed = unpacked(packed(counts, None))
    assert timed is None and again.tolist()[:3] == [1, 2, MAX_COUNT]
    assert ages_at(100, torch.tensor([100, 40, 130, -(2**40)])).tolist() == [0, 60, 0, MAX_AGE]


def test_the_time_of_a_value_is_that_of_its_row():
    times = torch.tensor([10, 20, 30])
    ids = KeyedJaggedTensor(["a", "b"], torch.arange(4), lengths=torch.tensor([1, 0, 1, 0, 2, 0], dtype=torch.int32))
    assert times_of_values(ids, times).tolist() == [10, 30, 20, 20]
    one_each = KeyedJaggedTensor(["a", "b"], torch.arange(6), lengths=torch.ones(6, dtype=torch.int32))
    assert times_of_values(one_each, times).tolist() == [10, 20, 30, 10, 20, 30]
    assert latest(torch.tensor([5, 3, 9]), torch.tensor([1, 1, 0]), 3).tolist() == [9, 5, MIN_TIME]
