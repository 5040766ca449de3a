"""Scales of all tables of a set are learned at once, bit for bit as by so many tables, in as many operations for any
number of them."""

import pytest
import torch

from tessera.embedding.config import Admission, DynamicTableConfig, Group, ScaleOptimizer
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.set_update import RecordsUpdate
from tessera.embedding.table_set import TableSet
from tessera.kernels.backend import available_backends
from tessera.kernels.unique import unique_tables
from tests.embedding.test_table_set import LAYOUTS, Both, Count, configs, drawn

SCALES = ScaleOptimizer(lr=1e-3, weight_decay=0.01)
LEARNED = {
    "learned": (
        (Group("v", 7, 0.1, "int8", learned=SCALES), Group("w", 1, 0.1), Group("u", 4, 0.1, "bf16")),
        RowOptimizer("adam", state_format="bf16", old_rows_factor=0.5, decay=0.1, decay_count_power=0.5),
    ),
    "clipped": ((Group("v", 5, 0.1, "int4", learned=SCALES),), RowOptimizer("rowwise_adagrad", clip_norm=1.5)),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_two_passes_are_those_of_so_many_tables(backend, kind, monkeypatch):
    """Which round at random, have learning rates of their own, and rows that are old or not."""
    monkeypatch.setitem(LAYOUTS, kind, LEARNED[kind])
    both, generator = Both(configs(kind)), torch.Generator().manual_seed(1)
    for step in range(6):
        flat, bounds = drawn(generator, 40, 60)
        if step == 3:
            for table in (*both.parts[1:], *both.tables[1:]):
                table.begin_period()
                table.mark()
        ids, inverse, counts, ends = unique_tables(flat, bounds)
        rows = both.set.lookup(ids, ends, step, counts)
        grads = torch.randn(flat.numel(), both.set.width, generator=generator)
        rates = [table.optimizer.lr for table in both.set.tables]
        update = RecordsUpdate(both.set, rows, grads, inverse, rates)
        found = update.gather(inverse)
        update.learn(found * grads, inverse)
        for t, table in enumerate(both.tables):
            own, mine = slice(*bounds[t : t + 2].tolist()), slice(*ends[t : t + 2].tolist())
            old, places = table.lookup(ids[mine], step, counts[mine]), inverse[own] - mine.start
            alone = table.begin_update(old, grads[own], places)
            assert alone.gather(places).equal(found[own])
            alone.learn(found[own] * grads[own], places)
    both.check()
    for part, table in zip(both.parts[1:], both.tables[1:], strict=True):
        assert [i.tolist() for i in part.touched_since(1)] == [i.tolist() for i in table.touched_since(1)]


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
@pytest.mark.parametrize("tables", [1, 40])
def test_sliding_admission_and_learned_scales_take_as_many_operations_for_any_number_of_tables(tables):
    groups, optimizer = LEARNED["learned"]
    rule = Admission("sliding", 2, capacity=100)
    found = TableSet([DynamicTableConfig(f"t{i}", ("f",), groups, optimizer, admission=rule) for i in range(tables)])
    bounds, ids, counted = torch.arange(tables + 1) * 20, torch.arange(20).repeat(tables), []
    for step in range(3):  # ids are counted, added, and known
        with Count() as count:
            rows = found.lookup(ids, bounds, step)
            update = RecordsUpdate(found, rows, torch.ones(ids.numel(), found.width), None, [0.1] * tables)
            update.learn(update.gather())
        counted.append(count.ops)
    assert len(found) == 20 * tables and max(counted) <= 310, counted
