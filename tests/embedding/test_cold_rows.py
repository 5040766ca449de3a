"""The incremental choice of the coldest rows against sorting all of them."""

import random

import pytest
import torch

from tessera.embedding import cold_rows
from tessera.embedding.cold_rows import ColdRows
from tessera.embedding.row_index import RowIndex


def coldest_by_sorting(index, policy, wanted, keep):
    rows = []
    for some, meta in index.walk(1000):
        rows += zip(meta[:, 0].tolist(), meta[:, 1].tolist(), some.tolist(), strict=True)
    rows = [row for row in rows if row[2] not in keep]
    rows.sort(key=lambda row: row if policy == "lru" else (row[1], row[0], row[2]))
    return [row[2] for row in rows[:wanted]] if len(rows) >= wanted else None


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_equals_sorting_the_whole_table(backend, policy, seed, monkeypatch):
    monkeypatch.setattr(cold_rows, "QUEUE_LEAST", 16)
    monkeypatch.setattr(cold_rows, "QUEUE_SHARE", 8)
    monkeypatch.setattr(cold_rows, "SAMPLE", 32)
    draw, index, limit = random.Random(seed), RowIndex(32), 300
    cold, next_id, calls = ColdRows(index, policy), 0, 0
    for step in range(250 if backend == "cpp" else 80):
        now = step // 5 - draw.choice([0, 0, 0, 20])  # equal and late times
        new = draw.randint(0, 12) if step % 40 else limit  # now and then more than the pool holds
        keep = torch.tensor(draw.sample(range(max(1, index.end)), min(index.end, draw.choice([0, 5, 60]))) + [-1])
        in_use = {row for rows, _ in index.walk(1000) for row in rows.tolist()}
        keep = keep[[row in in_use or row == -1 for row in keep.tolist()]]
        new = min(new, limit - len(keep))
        missing = len(index) + new - limit
        if missing > 0:
            rows = cold.take(missing, keep)
            calls += 1
            assert rows.tolist() == coldest_by_sorting(index, policy, missing, keep.tolist())
            index.remove(rows)
        if new:
            rows = index.add(torch.arange(next_id, next_id + new), 0)
            next_id += new
            cold.add(rows)
            index.touch(rows, now, None)
        index.touch(keep, now, torch.randint(1, 4, keep.shape, generator=torch.Generator().manual_seed(step)))
        if draw.random() < 0.1:  # expiry frees rows behind its back
            in_use = [row for rows, _ in index.walk(1000) for row in rows.tolist()]
            index.remove(torch.tensor(draw.sample(in_use, min(len(in_use) // 3, 9)), dtype=torch.int64))
    assert 1 < cold.passes < calls / 2, "most calls are served without a pass"


def test_too_few_rows():
    index = RowIndex(8)
    rows = index.add(torch.arange(5), 0)
    index.touch(rows, 3, None)
    assert ColdRows(index, "lru").take(3, rows[:3]) is None
    assert ColdRows(index, "lru").take(2, rows[:3]).tolist() == [3, 4]
