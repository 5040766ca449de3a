"""Sharded tables against the same on the host with a cache, and with the next batch on its way: the same bits."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.sharding import shard
from tessera.embedding.cached_table import CachedTable
from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.errors import CacheFull, TableFull, TesseraError
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tests.ranks import on_ranks

IDS, BATCH, STEPS = ["a", "b", "c"], 12, 14
PAUSES = (4, 5, 9)  # something looks at the tables after these steps
POOL = 400  # ids of a feature
FP32 = (Group("v", 4, 0.5), Group("w", 1, 0.5))
INT8 = (Group("v", 4, 0.5, "int8", scale=0.02, learned=ScaleOptimizer(lr=0.01)), Group("w", 1, 0.5, "fp16"))
#: rows: of the cache of one rank that owns all ids, hardly more than two batches need
CASES = {
    "rows": {"rows": 44, "optimizer": "rowwise_adagrad", "oov": "learned", "admission": Admission("exact", 2)},
    "bags": {
        "rows": 64,
        "optimizer": "adagrad",
        "bag_tables": ("bc",),
        "weighted": True,
        "eviction": "lru",
        "max_rows": 150,
    },
    "scales": {
        "rows": 64,
        "optimizer": "adam",
        "groups": INT8,
        "bag_tables": ("a",),
        "eviction": "lfu",
        "max_rows": 160,
    },
}


def tables_of(cache_rows, optimizer, groups=FP32, admission=None, old_rows_factor=1.0, **more):
    optimizer = RowOptimizer(optimizer, lr=0.1, old_rows_factor=old_rows_factor)
    common = {"admission": admission or Admission(), "seed": 3, "ttl_seconds": 5, "chunk_rows": 64, **more}
    return [
        DynamicTableConfig(name, features, groups, optimizer, cache_rows=cache_rows, **common)
        for name, features in (("a", ("a",)), ("bc", ("b", "c")))
    ]


class Model(nn.Module):
    def __init__(self, cache_rows, weighted=False, **options):
        super().__init__()
        self.weighted = weighted
        names = ("oov", "bag_tables", "init", "timeout_seconds")
        of_tables = {name: options.pop(name) for name in names if name in options}
        self.tables = DynamicTables(tables_of(cache_rows, **options), IDS, 100, ["b"], **of_tables)
        self.mix = nn.Parameter(torch.randn(3 * 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids):
        out = self.tables(ids)
        return (torch.cat([out["v"].flatten(1), out["w"].flatten(1)], 1) * self.mix).sum(1).square()


def batch_of(process, step, *, weighted=False):
    """This rank's part of a batch: bags of up to 3 ids, some of them often; no rows on the last rank in step 7."""
    generator = torch.Generator().manual_seed(1000 * step + process.rank)
    rows = BATCH // process.world_size
    if step == 7 and process.world_size > 1 and process.rank == process.world_size - 1:
        rows = 0
    lengths = torch.randint(0, 4, (3 * rows,), generator=generator, dtype=torch.int32)
    ids = (POOL ** torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64)).long() * 7919 - 2**60
    weights = torch.rand(len(ids), generator=generator) if weighted else None
    return KeyedJaggedTensor(IDS, ids, lengths=lengths, weights=weights, stride=rows)


def looked_at(model, sharded, process, step):
    """What may happen between two steps: expiry, evaluation, rows for a saved state."""
    model.tables.expire(100 + step)
    model.tables.begin_period()
    sharded.eval()
    with torch.no_grad():
        seen = sharded(batch_of(process, step + 50, weighted=model.weighted))
    sharded.train()
    return [seen, *content(model.tables)]


def content(tables):
    """All but bytes: rows of a set are padded."""
    parts = []
    for table in tables.owned().values():
        table.mark()
        for rows in table.export_rows():
            parts += [getattr(rows, field.name) for field in dataclasses.fields(rows)]
        stats = {name: number for name, number in table.stats().items() if not name.startswith("bytes")}
        parts += [*table.export_state().values(), torch.tensor(list(stats.values()))]
    return [part for part in parts if part is not None]


def train(process, cache_rows, ahead, **case):
    """All tensors that came out of a training, and the counts of the caches."""
    model = Model(cache_rows, **case)
    sharded, _ = shard(model, model.tables, process, BATCH)
    tables, found = model.tables, []
    batches = [batch_of(process, step, weighted=model.weighted) for step in range(STEPS)]
    prepared = -1
    for step, ids in enumerate(batches):
        if ahead and prepared < step:
            tables.begin(ids)
            tables.bring(100 + step)
        tables.begin_step(100 + step, learn_scales=tables.learns_scales)
        if ahead and step not in PAUSES and step + 1 < STEPS:
            prepared = step + 1
            tables.begin(batches[prepared])
            tables.bring(100 + prepared)
        out = sharded(ids)
        tables.send_begun()
        out.sum().backward()
        found.append(out.detach())
        if tables.learns_scales:
            with tables.second_pass():
                model(ids).sum().backward()
        with torch.no_grad():
            for parameter in tables.dense_parameters().values():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        if step in PAUSES:
            found += looked_at(model, sharded, process, step)
    found += content(tables)
    return found, tables.cache_stats()


def same_with_and_without(process):
    """For each case whether all is alike, and the hits, misses and rows written back with the next batch on its way."""
    results = {}
    for name, options in CASES.items():
        case = {key: value for key, value in options.items() if key != "rows"}
        cache_rows = options["rows"] if process.world_size == 1 else options["rows"] // process.world_size + 12
        plain, none = train(process, None, ahead=False, **case)
        assert none is None
        for rows, ahead in ((None, True), (cache_rows, False), (cache_rows, True)):
            found, stats = train(process, rows, ahead, **case)
            assert len(found) == len(plain), name
            for one, other in zip(found, plain, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other), (name, rows, ahead)
        results[name] = [sum(one[key] for one in stats.by_table.values()) for key in ("hits", "misses", "written_back")]
    return results


@pytest.mark.parametrize("world", [2, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 3))])
def test_every_bit_is_that_of_tables_without_cache(world):
    results = on_ranks(world, same_with_and_without)
    for name in CASES:
        hits, misses, written_back = (sum(result[name][i] for result in results) for i in range(3))
        assert hits > 100 and misses > 50 and written_back > 50, (name, hits, misses, written_back)


def started(process, cache_rows=130, **more):
    model = Model(cache_rows, **{"optimizer": "sgd", **more})
    sharded, _ = shard(model, model.tables, process, BATCH)
    return model.tables, sharded


def test_what_the_thread_raises_reaches_the_step(process):
    tables, sharded = started(process, cache_rows=30)
    batches = [batch_of(process, step) for step in range(2)]
    for now, ids in enumerate(batches):
        tables.begin(ids)
        tables.bring(now)
    with pytest.raises(CacheFull, match=r"table bc: two batches in a row need \d+ rows in the cache, which has 30; "):
        for ids in batches:
            sharded(ids).sum().backward()
    tables, sharded = started(process, max_rows=5)
    tables.begin(batches[0])
    tables.bring(0)
    with pytest.raises(TableFull, match="table a: limit of 5 rows"):
        sharded(batches[0])


def test_a_step_does_not_wait_for_ever(process, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(CachedTable, "bring", lambda *_: go_on.wait(60))
    tables, sharded = started(process, timeout_seconds=0.2)
    ids = batch_of(process, 0)
    tables.begin(ids)
    tables.bring(0)
    with pytest.raises(TesseraError) as error:
        sharded(ids)
    go_on.set()
    assert str(error.value) == (
        "waited 0.2 s (trainer.timeout_seconds) for the host manager's thread, "
        "which brings the rows of a batch to the cache"
    )


def test_misuse_is_an_assertion(process):
    tables, sharded = started(process)
    first, second = (batch_of(process, step) for step in range(2))
    tables.begin(first)
    tables.bring(0)
    with pytest.raises(AssertionError, match="table a: asked while the batch of a later step is prefetched"):
        tables.expire(10)
    sharded.eval()
    with pytest.raises(AssertionError, match="asked while the batch of a later step"):
        sharded(second)
    sharded.train()
    with pytest.raises(AssertionError, match="another batch was begun for this step"):
        sharded(second)
