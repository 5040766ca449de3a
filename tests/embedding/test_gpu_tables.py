"""Tables in GPU memory: the same life as on the CPU. Without a GPU, on one that is pretended and interpreted."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch

from tessera.embedding.config import Admission, DynamicTableConfig
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.table import DynamicTable
from tessera.kernels import backend
from tessera.kernels.unique import unique_inverse
from tests.embedding.test_formats import CONFIGS, groups_of

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():

    def gpu():
        return contextlib.nullcontext()
elif "triton" in backend.available_backends():
    from tests.kernels.pretended_gpu import PretendedGpu as gpu
else:
    pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported", allow_module_level=True)

PLAIN = {
    name: (groups_of("fp32"), RowOptimizer(name, lr=0.1))
    for name in ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")
}


def config_of(name, **more):
    groups, optimizer = {**PLAIN, **CONFIGS}[name]
    return DynamicTableConfig("t", ("f",), groups, optimizer, seed=3, chunk_rows=64, ttl_seconds=40, **more)


def batches(count):
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(-80, 80, (90,), generator=generator) * 2**55 + 10 * step
        yield 100 + 20 * step, ids, *torch.randn((2, len(ids), 7), generator=generator)


def train(table, count=3):
    """Merge, look up, gather, update; with learned scales both passes. Returns what was gathered, on the CPU."""
    gathered = []
    for now, ids, grads, second in batches(count):
        unique, inverse, counts = unique_inverse(ids.to(table.device))
        grads, second = grads.to(table.device), second.to(table.device)
        rows = table.lookup(unique, now, counts)
        gathered.append(table.gather(rows, inverse).cpu())
        if table.config.learns_scales:
            update = table.begin_update(rows, grads, inverse)
            update.learn(second * update.gather(inverse), inverse)
        else:
            table.update(rows, grads, inverse)
    return gathered


def content(table):
    """All rows as one batch, on the CPU."""
    parts = [vars(part) for part in table.export_rows(50)]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0] if parts[0][name] is not None}


def assert_same(found, expected, exact):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if exact or name not in ("values", "state", "scale"):
            assert found[name].equal(value), name
        elif value.dtype == torch.uint8:
            assert (found[name] != value).float().mean() < 0.02, name  # a code on the edge of two
        else:
            torch.testing.assert_close(found[name], value, rtol=0.02, atol=1e-3)


def some(names, usual):
    """Parameters of which only the usual ones run by default where every kernel is interpreted."""
    slow = [] if torch.cuda.is_available() else [pytest.mark.slow]
    return [pytest.param(*name, marks=[] if name in usual else slow) for name in names]


@pytest.mark.parametrize(
    "name",
    some(
        [(name,) for name in (*PLAIN, *CONFIGS)],
        [("sgd",), ("adam",), ("rowwise_adagrad",), ("bf16",), ("int4",), ("learned, adam",)],
    ),
)
def test_training_gives_the_rows_of_the_cpu(name):
    on_cpu = DynamicTable(config_of(name))
    expected = train(on_cpu), content(on_cpu)
    with gpu():
        on_gpu = DynamicTable(config_of(name), "cuda")
        found = train(on_gpu), content(on_gpu)
        backend.check("cuda:0")
    for one, other in zip(*(gathered for gathered, _ in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if name in PLAIN else 0.03)
    exact = name in ("sgd", "adagrad", "bf16", "int4", "int2")  # no sum over columns, which backends order differently
    assert_same(found[1], expected[1], exact)
    assert on_gpu.stats() == on_cpu.stats()


ADMISSIONS = (Admission(), Admission("exact", 2), Admission("sliding", 2, 1000))


@pytest.mark.parametrize(
    ("admission", "eviction"),
    some(itertools.product(ADMISSIONS, ("lru", "lfu")), [(ADMISSIONS[0], "lru"), (ADMISSIONS[1], "lfu")]),
)
def test_rows_come_and_go_as_on_the_cpu(admission, eviction):
    """Admission, eviction at the limit, expiry, ids given up, marks, export and import."""
    config = config_of("sgd", max_rows=150, eviction=eviction, admission=admission)

    def life(device):
        table = DynamicTable(config, device)
        table.take_evicted()
        train(table, 2)
        mark = table.mark()
        train(table, 4)
        table.expire(175, budget_rows=40)
        table.expire(175)
        touched = [ids.cpu() for ids in table.touched_since(mark)]
        state = {key: value.cpu() for key, value in table.export_state().items()}
        again = DynamicTable(config, device)
        for part in table.export_rows(30):
            again.import_rows(part)
        again.import_state({key: value.to(device) for key, value in state.items()})
        return content(table), content(again), table.take_evicted().cpu(), torch.cat(touched), state, table.stats()

    expected = life("cpu")
    with gpu():
        found = life("cuda")
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert_same(one, other, exact=True)
    assert found[2].equal(expected[2]) and found[3].equal(expected[3]) and found[5] == expected[5]
    assert found[4].keys() == expected[4].keys()
    assert all(found[4][key].equal(value) for key, value in expected[4].items())


def test_old_rows_are_merged_without_a_race(monkeypatch):
    """As on the CPU, where positions are added in their order; `index_add_` of floats would be atomic on a GPU."""
    groups, optimizer = groups_of("fp32"), RowOptimizer("sgd", lr=0.1, old_rows_factor=0.25)
    config = DynamicTableConfig("t", ("f",), groups, optimizer, seed=3, chunk_rows=64)

    def life(device):
        table = DynamicTable(config, device)
        train(table, 2)
        table.begin_period()
        train(table, 3)
        return content(table)

    expected, add = life("cpu"), torch.Tensor.index_add_

    def integers_alone(tensor, *arguments, **more):
        assert not tensor.is_floating_point()
        return add(tensor, *arguments, **more)

    with gpu():
        monkeypatch.setattr(torch.Tensor, "index_add_", integers_alone)
        found = life("cuda")
    assert_same(found, expected, exact=True)


def test_evaluation_changes_nothing_and_growth_moves_nothing():
    with gpu():
        table = DynamicTable(config_of("rowwise_adagrad"), "cuda")
        train(table, 1)
        before = content(table)
        ids = torch.arange(1, 501, device="cuda")
        assert table.lookup(ids, 0, training=False).cpu().eq(-1).all()
        assert_same(content(table), before, exact=True)
        first = [chunk.data_ptr() for chunk in table._store.groups[0].chunks]
        rows = table.lookup(ids, 500)
        assert len(table._store.groups[0].chunks) > len(first)
        assert [chunk.data_ptr() for chunk in table._store.groups[0].chunks][: len(first)] == first
        assert table.lookup(ids, 501).equal(rows)


def test_rows_from_the_host_are_taken_in():
    on_cpu = DynamicTable(config_of("int8"))
    train(on_cpu)
    with gpu():
        table = DynamicTable(config_of("int8"), "cuda")
        for part in on_cpu.export_rows(64):
            table.import_rows(RowBatch(**{**vars(part), "rows": None}))
        found = content(table)
    expected = content(on_cpu)
    order, other = found.pop("ids").argsort(), expected.pop("ids").argsort()
    del found["rows"], expected["rows"]
    assert all(found[name][order].equal(value[other]) for name, value in expected.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits are counted on the pretended GPU")
@pytest.mark.parametrize("name", ["rowwise_adagrad", "int8"])
def test_a_step_waits_for_the_gpu_twice(name):
    """For the number of distinct ids and of unknown ones; gather and update wait for nothing. That numbers are in range
    is asked under the interpreter alone."""
    from tessera.kernels.triton_ops import faults

    with mock.patch.object(faults, "check", lambda device: None), gpu() as pretended:
        table = DynamicTable(config_of(name), "cuda")
        ids, grads = torch.arange(40, device="cuda") // 2, torch.ones((40, 7), device="cuda")
        table.lookup(unique_inverse(ids)[0], 0)
        pretended.waits = 0
        unique, inverse, counts = unique_inverse(ids)
        rows = table.lookup(unique, 1, counts)
        assert pretended.waits == 2
        table.gather(rows, inverse)
        table.update(rows, grads, inverse)
        assert pretended.waits == 2
