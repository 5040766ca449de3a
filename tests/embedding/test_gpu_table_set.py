"""A set of tables in GPU memory, on a pretended and interpreted one: as on the CPU, and what a step costs the host."""

import pytest
import torch

from tessera.embedding import growth
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.errors import TableFull
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.set_table import SetTable
from tessera.embedding.table_set import TableSet
from tessera.kernels import backend, records
from tessera.kernels.records import Positions
from tessera.kernels.unique import positions_of, unique_tables

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available() or "triton" not in backend.available_backends():
    pytest.skip("needs Triton's interpreter, and no GPU", allow_module_level=True)

from tests.kernels.counted_gpu import CountedGpu

GROUPS = (Group("v", 16, 0.0), Group("w", 1, 0.0))


def tables_of(count, optimizer="rowwise_adagrad", **more):
    return [
        DynamicTableConfig(f"t{i}", ("f",), GROUPS, RowOptimizer(optimizer, lr=0.1), ttl_seconds=40, **more)
        for i in range(count)
    ]


def step(found, ids, bounds, now, generator):
    """One step of training as it runs on a GPU; returns what was gathered."""
    unique, inverse, counts, ends = unique_tables(ids, bounds, padded=True)
    positions = Positions(*positions_of(inverse, counts))
    rows = found.lookup(unique, ends, now, counts)
    values = found.gather(rows, inverse)
    grads = torch.randn((ids.numel(), found.width), generator=generator).to(found.device)
    found.update(rows, grads, positions)
    return values


def contents(found):
    parts = [(t, batch) for t in range(len(found.tables)) for batch in SetTable(found, t).export_rows()]
    rows = [
        (t, id_, time, count, *values, *state)
        for t, batch in parts
        for id_, time, count, values, state in zip(
            *(x.cpu().tolist() for x in (batch.ids, batch.last_seen, batch.count, batch.values, batch.state)),
            strict=True,
        )
    ]
    return sorted(rows)


def live(device):
    """Batches of known and new ids of four tables, of which one has none, and rows that expire."""
    found, generator, gathered = TableSet(tables_of(4, "adagrad"), device), torch.Generator().manual_seed(0), []
    for turn in range(5):
        ids = torch.randint(-60, 60, (300,), generator=generator) * 2**50 + turn * 10
        bounds = torch.tensor([0, 100, 100, 220, 300])
        gathered.append(step(found, ids.to(device), bounds.to(device), 10 * turn, generator).cpu())
        if turn == 3:
            for table in range(len(found.tables)):
                SetTable(found, table).expire(55)
    return gathered, contents(found), found.rows_in_use, found.counters.tolist()


def test_a_set_lives_as_on_the_cpu():
    expected = live("cpu")
    with CountedGpu():
        found = live("cuda")
        backend.check("cuda:0")
    assert all(one.equal(other) for one, other in zip(found[0], expected[0], strict=True))
    assert found[1:] == expected[1:] and len(found[1]) > 200


def test_a_set_that_grows_ends_in_a_line_before_the_memory_does(monkeypatch):
    """Known ids can be looked up as before, and saved."""
    monkeypatch.setattr(records, "chunk_rows", lambda reserved: max(128, min(reserved, 512)))
    with CountedGpu():
        found, turns = TableSet(tables_of(2, "sgd"), "cuda"), range(3)
        free, each = 3 * 128 * found.layout.bytes, found.tables[1].bytes_per_row
        monkeypatch.setattr(growth, "room_for_tables", lambda device: free - found.reserved_bytes)
        bounds = torch.tensor([0, 10, 100], device="cuda")
        with pytest.raises(TableFull) as error:
            for turn in turns:
                found.lookup((torch.arange(100) + 100 * turn).to("cuda"), bounds, turn)
        used = found.rows_in_use[1]
        assert used == 90 * turn and found.lookup(torch.arange(100, device="cuda"), bounds, 20).cpu().min() >= 0
        assert sum(rows.ids.numel() for rows in SetTable(found, 1).export_rows()) == used
    assert str(error.value) == (
        f"table t1: {used:,} rows in use, {used * each:,} bytes, 90 more wanted, and the GPU's memory is full "
        f"({256 * found.layout.bytes:,} bytes wanted, {128 * found.layout.bytes:,} bytes free for tables); set "
        "max_rows or max_bytes with eviction lru or lfu, or set ttl_seconds"
    )


def test_many_empty_tables_cost_little():
    with CountedGpu():
        found = TableSet(tables_of(200), "cuda")
        found.lookup(torch.arange(200, device="cuda"), torch.arange(201, device="cuda"), 1)
        tensors = [*found.store.chunks, *found.map._chunks, found.map.segments, found.rates, found.periods]
        assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) < 3 << 20


def test_a_map_in_gpu_memory_grows_by_chunks_that_double():
    """Chunks of 4, 4 and 8 segments; what was found before is found after."""
    ids = torch.randint(-(2**63), 2**63 - 1, (24_000,), generator=torch.Generator().manual_seed(0))
    with CountedGpu():
        found = TableSet(tables_of(1, "sgd"), "cuda").map
        for part, rows in zip(ids.split(12_000), torch.arange(24_000).split(12_000), strict=True):
            found.insert(part.to("cuda"), rows.to("cuda"))
        assert [len(chunk) for chunk in found._chunks] == [4, 4, 8]
        assert found.find(ids.to("cuda")).cpu().equal(torch.arange(24_000))
        kept = {int(i): int(row) for part in found.items() for i, row in zip(*(x.cpu() for x in part), strict=True)}
    assert len(kept) == 24_000


def test_segments_of_the_map_are_split_in_few_of_many_steps():
    """Of 6 steps with new ids, once rows have memory; the others wait once."""
    with CountedGpu() as gpu:
        found, bounds, counted = TableSet(tables_of(1, "sgd"), "cuda"), torch.tensor([0, 1000], device="cuda"), []
        found._rows.provide({0: 6_000}, limited=False)
        for turn in range(6):
            ids = torch.arange(1000 * turn, 1000 * turn + 1000, device="cuda")
            with gpu.counting() as counts:
                found.lookup(ids, bounds, 1)
            counted += counts
        ids = torch.arange(6_000, device="cuda")
        assert len(found) == 6_000 and found.find(ids, torch.tensor([0, 6_000], device="cuda")).cpu().min() >= 0
    waits = [counts.waits for counts in counted]
    assert waits.count(1) >= 4, waits


@pytest.mark.parametrize("tables", [1, 26, 200])
def test_a_step_costs_the_host_as_much_for_any_number_of_tables(tables):
    """Operations and launches of merging, look-up, gather and update; the host waits once, for how many ids are new."""
    with CountedGpu() as gpu:
        found, bounds = TableSet(tables_of(tables), "cuda"), (torch.arange(tables + 1) * 8).to("cuda")
        counted = []
        for begin in (0, 0, 4, 8):
            ids = (torch.arange(8).repeat(tables) // 2 + begin).to("cuda")
            grads = torch.ones((ids.numel(), found.width), device="cuda")
            with gpu.counting() as counts:
                unique, inverse, often, ends = unique_tables(ids, bounds, padded=True)
                positions = Positions(*positions_of(inverse, often))
                rows = found.lookup(unique, ends, 1, often)
                found.gather(rows, inverse)
                found.update(rows, grads, positions)
            counted += counts
        assert len(found) == 12 * tables
    _, known, new, again = counted
    assert known.issued <= 24 and known.waits == 1, known
    assert max(new.issued, again.issued) <= 68 and new.waits == again.waits == 1, (new, again)
