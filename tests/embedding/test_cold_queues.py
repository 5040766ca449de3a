"""Tables at their limit in GPU memory, on a pretended and interpreted one: the same victims as on the CPU, and what a
step costs the host."""

import pytest
import torch

from tessera.embedding import cold_queues
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.errors import TableFull
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.set_table import SetTable
from tessera.embedding.table_set import TableSet
from tessera.kernels import backend
from tessera.kernels.records import Positions
from tessera.kernels.unique import positions_of, unique_tables

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available() or "triton" not in backend.available_backends():
    pytest.skip("needs Triton's interpreter, and no GPU", allow_module_level=True)

from tests.kernels.counted_gpu import CountedGpu

GROUPS = (Group("v", 4, 0.5), Group("w", 1, 0.0))


def set_of(device, limits, evictions):
    adagrad = RowOptimizer("adagrad", lr=0.1)
    pairs = enumerate(zip(limits, evictions, strict=True))
    of_tables = [
        DynamicTableConfig(f"t{i}", ("f",), GROUPS, adagrad, ttl_seconds=60, max_rows=limit, eviction=eviction)
        for i, (limit, eviction) in pairs
    ]
    return TableSet(of_tables, device)


def step(found, ids, bounds, now, generator):
    """One step of training; every id has a time of its own. Returns the rows of the distinct ids."""
    unique, inverse, often, ends = unique_tables(ids.to(found.device), bounds.to(found.device), padded=True)
    rows = found.lookup(unique, ends, now - unique % 11, often)
    grads = torch.randn((ids.numel(), found.width), generator=generator).to(found.device)
    found.update(rows, grads, Positions(*positions_of(inverse, often)))
    return rows[: int(ends[-1])].cpu()


def live(device, batches, limits, evictions, *, expires):
    """Returns all that can be seen of tables through steps in which some are at their limit."""
    found, generator = set_of(device, limits, evictions), torch.Generator().manual_seed(7)
    SetTable(found, 0).take_evicted()
    given = []
    for turn, (ids, bounds, now) in enumerate(batches):
        given.append(step(found, ids, bounds, now, generator))
        if expires and turn % 4 == 3:
            for table in range(len(limits)):
                SetTable(found, table).expire(now, 100)
    tables = [SetTable(found, table) for table in range(len(limits))]
    rows = [{k: v.cpu() for k, v in vars(batch).items() if v is not None} for t in tables for batch in t.export_rows()]
    states = [{name: value.cpu() for name, value in table.export_state().items()} for table in tables]
    return given, rows + states, found.counters.tolist(), sorted(tables[0].take_evicted().cpu().tolist()), found


def batches_of(tables, ids, span, turns, generator, filled=0):
    """Skewed ids that move on, faster with `filled`, ids of each table that come first, once; times go back once."""
    found = []
    if filled:
        found.append((torch.arange(filled).repeat(tables) - filled, torch.arange(tables + 1) * filled, 0))
    for turn in range(turns):
        values = (torch.rand(ids * tables, generator=generator) ** 2 * span).long() + turn * (20 if filled else 3)
        found.append((values, torch.arange(tables + 1) * ids, 10 * turn - 60 * (turn >= turns // 2)))
    return found


def assert_alike(one, other):
    assert all(mine.equal(theirs) for mine, theirs in zip(one[0], other[0], strict=True))
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert mine.keys() == theirs.keys() and all(mine[key].equal(theirs[key]) for key in mine)
    assert one[2:4] == other[2:4]


CASES = [
    # ids of a batch and table, their span, rows at first, turns, limits, evictions, whether rows expire, least passes
    (12, 40, 0, 4, [16, None, 40], ["lru", "lru", "raise"], False, 1),
    pytest.param(40, 120, 0, 14, [50, 60, 1000, 45], ["lru", "lfu", "raise", "lru"], True, 1, marks=pytest.mark.slow),
    pytest.param(40, 400, 0, 14, [150, None, 170, 145], ["lru", "lfu", "lru", "lfu"], True, 1, marks=pytest.mark.slow),
    pytest.param(40, 60, 0, 14, [40, 41, 44, 45], ["lfu", "lfu", "lru", "lru"], True, 1, marks=pytest.mark.slow),
    pytest.param(20, 900, 1500, 20, [1500, 1501], ["lru", "lfu"], True, 1, marks=pytest.mark.slow),
    pytest.param(20, 900, 1500, 20, [1500, 1501], ["lfu", "lru"], False, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ids", "span", "filled", "turns", "limits", "evictions", "expires", "passes"), CASES)
def test_rows_that_go_are_those_that_go_on_a_cpu(
    monkeypatch, ids, span, filled, turns, limits, evictions, expires, passes
):
    """To the bit: rows, their numbers, what is free, counts and evicted ids."""
    monkeypatch.setattr(cold_queues, "QUEUE_LEAST", 16)
    monkeypatch.setattr(cold_queues, "STEPS", 2)
    batches = batches_of(len(limits), ids, span, turns, torch.Generator().manual_seed(ids), filled)
    expected = live("cpu", batches, limits, evictions, expires=expires)
    with CountedGpu():
        found = live("cuda", batches, limits, evictions, expires=expires)
        backend.check("cuda:0")
    assert_alike(found, expected)
    assert sum(expected[2][-1]) > 10 and found[4].limits.queues.passes >= passes


def test_a_batch_that_does_not_fit_ends_in_a_line_and_nothing_was_noted():
    said = []
    for device in ("cpu", "cuda"):
        with CountedGpu():
            found, generator = set_of(device, [6, 8], ["lru", "raise"]), torch.Generator().manual_seed(0)
            step(found, torch.arange(8), torch.tensor([0, 4, 8]), 100, generator)
            for ids in ([0, 1, 7, 8, 9, 10, 11, 4, 5], [0, 1, 4, 5, 8, 9, 10, 11, 12]):
                with pytest.raises(TableFull) as error:
                    step(
                        found, torch.tensor(ids), torch.tensor([0, 7, 9] if ids[2] == 7 else [0, 2, 9]), 200, generator
                    )
                said.append(str(error.value))
            rows = next(SetTable(found, 0).export_rows())
            assert rows.count.cpu().eq(1).all() and rows.last_seen.cpu().max() == 100, device
            assert found.rows_in_use == [4, 4]
            step(found, torch.tensor([0, 1, 7, 8, 9, 4, 5]), torch.tensor([0, 5, 7]), 200, generator)
            assert found.rows_in_use == [6, 4] and found.counters[-1].tolist() == [1, 0]
    assert said[:2] == said[2:] and "table t0: limit of 6 rows, 4 in use, 5 more wanted by one batch" in said[0]
    assert "table t1: limit of 8 rows, 4 in use, 5 more wanted; raise max_rows" in said[1]


MORE = [pytest.param(*one, marks=pytest.mark.slow) for one in ((26, 0), (200, 0), (1, 900))]


@pytest.mark.parametrize(("tables", "filled"), [(1, 0), *MORE])
def test_a_step_at_a_limit_costs_the_host_little_more_than_one_with_new_ids(monkeypatch, tables, filled):
    """Operations and launches of merging, look-up, gather and update, and no more waits. With `filled` most rows are
    not in the queue, so nothing has to be put in order."""
    monkeypatch.setattr(cold_queues, "QUEUE_LEAST", 16)

    def counts(eviction):
        with CountedGpu() as gpu:
            limit, bounds = filled + 6, torch.arange(tables + 1) * 4
            found = set_of("cuda", [limit] * tables, [eviction] * tables)
            if filled:
                found.lookup(torch.arange(-filled, 0).to("cuda"), torch.tensor([0, filled]).to("cuda"), 0)
            bounds, counted = bounds.to("cuda"), []
            for turn in range(5):
                ids = (torch.arange(4).repeat(tables) + 2 * turn).to("cuda")
                grads = torch.ones((ids.numel(), found.width), device="cuda")
                with gpu.counting() as one:
                    unique, inverse, often, ends = unique_tables(ids, bounds, padded=True)
                    rows = found.lookup(unique, ends, 10 + turn, often)
                    found.gather(rows, inverse)
                    found.update(rows, grads, Positions(*positions_of(inverse, often)))
                counted += one
            assert found.counters[-1].tolist() == [6] * tables
        return counted[1], counted[-1]

    below, lru = counts("lru")
    assert lru.waits == below.waits == 1
    assert lru.issued <= (1.25 if filled else 1.5) * below.issued and lru.issued <= 106, (below, lru)
    if tables == 1 and not filled:
        assert counts("lfu")[1] <= lru
