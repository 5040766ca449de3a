"""A table on the host with its cache in GPU memory. Without a GPU, on one that is pretended and interpreted."""

import dataclasses

import pytest
import torch

from tessera.embedding.cached_table import CachedTable, make_table
from tessera.embedding.table import DynamicTable
from tessera.kernels.unique import unique_inverse
from tests.embedding.test_gpu_tables import assert_same, config_of, content, gpu

CACHE = 110  # rows: hardly more than two batches need, fewer than there are


def train(table, device):
    """Merge, look up, gather, update; with learned scales both passes. Returns what was gathered, on the CPU."""
    gathered = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        ids = (torch.randint(0, 80, (70,), generator=generator) + 40 * (step % 3)) * 2**52
        grads, second = torch.randn((2, len(ids), 7), generator=generator).to(device)
        unique, inverse, counts = unique_inverse(ids.to(device))
        where, rows = table, None
        if isinstance(table, CachedTable):
            where, rows = table.bring(unique, 100 + step, counts)
            assert rows.device.type == "cuda"
        else:
            rows = table.lookup(unique, 100 + step, counts)
        gathered.append(where.gather(rows, inverse).cpu())
        if table.config.learns_scales:
            update = where.begin_update(rows, grads, inverse, None, unique)
            update.learn(second * update.gather(inverse), inverse)
        else:
            where.update(rows, grads, inverse, None, unique)
    return gathered


@pytest.mark.parametrize("name", ["adam", "int8", "learned"])
def test_training_gives_the_rows_of_the_cpu(name):
    config = config_of(name)
    on_cpu = DynamicTable(config)
    expected = train(on_cpu, "cpu"), content(on_cpu)
    with gpu():
        cached = make_table(dataclasses.replace(config, cache_rows=CACHE), "cuda")
        assert isinstance(cached, CachedTable)
        gathered = train(cached, "cuda")
        stats, found = cached.cache_stats(), content(cached)
        assert all(part.device.type == "cpu" for part in found.values())
    assert stats["hits"] > 0 and stats["misses"] > len(on_cpu) > CACHE and stats["written_back"] > 0
    for one, other in zip(gathered, expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3 if name == "adam" else 0.05)
    assert_same(found, expected[1], exact=False)
