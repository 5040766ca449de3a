"""Tables of low precision: exact export and import, independence of order, true sizes, one line per mistake."""

import dataclasses

import pytest
import torch

from tessera.embedding.config import DynamicTableConfig, Group, scale_of_range
from tessera.embedding.convert import convert_rows
from tessera.embedding.errors import ConfigError
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.table import DynamicTable
from tessera.kernels.formats import code_range
from tessera.kernels.record_layout import is_plain
from tests.embedding.conftest import AmongOthers, both_kinds

pytestmark = [both_kinds, pytest.mark.usefixtures("of_table")]

LEARNED = ScaleOptimizer(lr=1e-3, weight_decay=0.01, gradient_scale=0.5)


def groups_of(v, w="fp32", learned=None, **more):
    return Group("v", 6, 0.3, v, scale=0.02, learned=learned, **more), Group("w", 1, 0.1, w)


CONFIGS = {
    "fp16": (groups_of("fp16", "fp16"), RowOptimizer("rowwise_adagrad", lr=0.1)),
    "bf16": (groups_of("bf16", "bf16"), RowOptimizer("adagrad", lr=0.1, initial_accumulator=0.1)),
    "int8": (groups_of("int8", "int8"), RowOptimizer("rowwise_adagrad", lr=0.1)),
    "int4": (groups_of("int4"), RowOptimizer("sgd", lr=0.1)),
    "int2": (groups_of("int2"), RowOptimizer("adagrad", lr=0.1)),
    "nearest": (groups_of("int8", rounding="nearest"), RowOptimizer("adam", lr=0.1)),
    "bf16 moments": (groups_of("int8"), RowOptimizer("adam", lr=0.1, state_format="bf16")),
    "fp32, bf16 moments": (groups_of("fp32"), RowOptimizer("adam", lr=0.1, state_format="bf16")),
    "mixed": (groups_of("bf16", "fp16"), RowOptimizer("ftrl", lr=0.1)),
    "learned": (groups_of("int8", learned=LEARNED), RowOptimizer("rowwise_adagrad", lr=0.1)),
    "learned, adam": (groups_of("int4", "fp16", LEARNED), RowOptimizer("adam", lr=0.05, state_format="bf16")),
}


def config_of(name, **more):
    groups, optimizer = CONFIGS[name]
    return DynamicTableConfig("t", ("f",), groups, optimizer, seed=3, chunk_rows=64, **more)


def step_of(table, ids, now, grads, second):
    """One training step: with learned scales both passes."""
    rows = table.lookup(ids, now)
    if not table.config.learns_scales:
        table.update(rows, grads)
        return
    ahead = table.begin_update(rows, grads)
    ahead.learn(second * ahead.gather())


def steps(count, first=0):
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(-100, 100, (60,), generator=generator).unique()
        yield step, ids, *torch.randn((2, len(ids), 7), generator=generator)


def content(table):
    parts = [vars(batch) for batch in table.export_rows(50)]
    order = torch.cat([part["ids"] for part in parts]).argsort()
    columns = ("ids", "values", "state", "last_seen", "count", "scale")
    return {c: torch.cat([part[c] for part in parts])[order] for c in columns if parts[0][c] is not None}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_made_of_exported_rows_goes_on_bit_for_bit(backend, name):
    table, twin = DynamicTable(config_of(name)), DynamicTable(config_of(name))
    for step, ids, grads, second in steps(8):
        step_of(table, ids, step, grads, second)
    twin.import_state(table.export_state())
    for batch in table.export_rows(33):
        twin.import_rows(batch)
    assert_same(content(table), content(twin))
    for step, ids, grads, second in steps(5, first=8):
        for one in (table, twin):
            step_of(one, ids, step, grads, second)
    assert_same(content(table), content(twin))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_order_of_a_batch_changes_no_bit(backend, name):
    """Rounding draws by id and step: neither row numbers nor positions matter."""
    table, other = DynamicTable(config_of(name)), DynamicTable(config_of(name))
    for step, ids, grads, second in steps(6):
        step_of(table, ids, step, grads, second)
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(step))
        rows = other.lookup(ids[order], step)
        inverse = order.argsort()
        if other.config.learns_scales:
            ahead = other.begin_update(rows, grads, inverse, ids=ids[order])
            ahead.learn(second * ahead.gather(inverse), inverse)
        else:
            other.update(rows, grads, inverse, ids=ids[order])
    assert_same(content(table), content(other))


def test_the_form_of_exported_rows(backend):
    table = DynamicTable(config_of("int8"))
    table.lookup(torch.arange(5), 0)
    batch = next(table.export_rows())
    assert batch.values.dtype == torch.uint8 and batch.values.shape == (5, 7)
    assert batch.scale.equal(torch.tensor([[0.02, 0.01]]).expand(5, 2)) and batch.state.shape == (5, 2)
    v = 0.02 * batch.values[:, :6].view(torch.int8)
    torch.testing.assert_close(table.gather(batch.rows)[:, :6], v)
    for name, dtype, columns in (("fp16", torch.float16, 7), ("bf16", torch.bfloat16, 7), ("mixed", torch.uint8, 14)):
        config = config_of(name) if name != "mixed" else config_of("learned, adam")
        table = DynamicTable(config)
        table.lookup(torch.arange(5), 0)
        batch = next(table.export_rows())
        wanted = columns if name != "mixed" else 3 + 2  # int4 codes of six values, bytes of one fp16
        assert batch.values.dtype == dtype and batch.values.shape == (5, wanted)


@pytest.mark.parametrize(("format", "tolerance"), [("fp16", 1e-3), ("bf16", 8e-3), ("int8", 0.02)])
def test_training_follows_that_of_float32(backend, format, tolerance):
    """The same gradients: values stay within a few roundings of the float32 ones."""
    optimizer = RowOptimizer("rowwise_adagrad", lr=0.05)
    tables = []
    for name in ("fp32", format):
        groups = (Group("v", 16, 0.1, name, scale=0.01),)
        tables.append(DynamicTable(DynamicTableConfig("t", ("f",), groups, optimizer, chunk_rows=64)))
    ids = torch.arange(50)
    for step in range(30):
        grads = torch.randn((50, 16), generator=torch.Generator().manual_seed(step))
        for table in tables:
            table.update(table.lookup(ids, step), grads)
    one, other = (table.gather(table.lookup(ids, 0, training=False)) for table in tables)
    assert (one - other).square().mean().sqrt() < tolerance * 5
    assert (one - other).abs().max() > 0


def test_bytes_per_row_are_those_of_the_chunks(backend):
    for name in CONFIGS:
        config = config_of(name)
        table = DynamicTable(config)
        table.lookup(torch.arange(10), 0)
        if isinstance(table, AmongOthers):
            layout = table.set.layout
            stored = sum(4 * (g.dim + g.state_floats) if is_plain(g) else g.bytes for g in layout.groups)
            assert layout.meta_at - 8 < stored <= layout.meta_at
        else:
            stored = sum(group.chunks[0][0].nbytes for group in table._store.groups)
        assert config.stored_bytes == stored, name
    int8 = DynamicTableConfig("t", ("f",), (Group("v", 64, 0.1, "int8"),), RowOptimizer())
    fp32 = dataclasses.replace(int8, groups=(Group("v", 64, 0.1),))
    assert int8.stored_bytes == 72 and fp32.stored_bytes == 260


def test_int8_rows_take_less_than_half_of_all_that_a_row_takes(backend):
    """Time, count, id and the id map included, in a table of usual size."""
    found = []
    for format in ("fp32", "int8"):
        groups = (Group("v", 64, 0.1, format), Group("w", 1, 0.1))
        table = DynamicTable(DynamicTableConfig("t", ("f",), groups, chunk_rows=1 << 16))
        for ids in torch.arange(200_000).split(50_000):
            table.lookup(ids, 0)
        found.append(table.stats()["bytes_per_row"])
    assert found[1] <= 0.45 * found[0]


def test_cleared_rows_start_afresh(backend):
    table = DynamicTable(config_of("learned", ttl_seconds=10))
    for step, ids, grads, second in steps(3):
        step_of(table, ids, step, grads, second)
    rows = next(table.export_rows()).rows
    table.expire(100)
    assert table.gather(rows).abs().sum() == 0
    fresh = DynamicTable(config_of("learned"))
    ids = torch.arange(5)
    first, second = (one.gather(one.lookup(ids, 0)) for one in (table, fresh))
    assert torch.equal(first, second)
    assert next(table.export_rows()).scale[:, 0].unique().tolist() == pytest.approx([0.02])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_single_row_goes_out_and_in(backend, name):
    """Its columns begin at any byte where groups of several formats lie side by side."""
    table, twin, plain = (DynamicTable(config_of(name)) for _ in range(3))
    table.lookup(torch.tensor([5]), 0)
    (batch,) = table.export_rows()
    twin.import_rows(batch)
    assert_same(content(table), content(twin))
    errors = {}
    plain.import_rows(convert_rows(batch, table.config, plain.config, errors))
    assert torch.equal(plain.gather(torch.tensor([0])), table.gather(torch.tensor([0])))


def test_scale_of_range():
    for format in ("int8", "int4", "int2"):
        assert scale_of_range(format, 1.5) * code_range(format)[0] == -1.5


def test_rows_of_another_form_are_refused(backend):
    table = DynamicTable(config_of("int8"))
    ids, state = torch.arange(2), torch.zeros(2, 2)
    values, steps = torch.zeros((2, 7), dtype=torch.uint8), torch.ones(2, 2)
    times = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"table t: values: expected torch.uint8 \[2, 7\], found torch.float32"):
        table.import_rows(RowBatch(ids, values.float(), state, times, times, scale=steps))
    with pytest.raises(ValueError, match=r"table t: scale: expected float32 \[2, 2\], found none"):
        table.import_rows(RowBatch(ids, values, state, times, times))
    with pytest.raises(ValueError, match=r"table t: state: expected float32 \[2, 2\], found"):
        table.import_rows(RowBatch(ids, values, state[:, :1], times, times, scale=steps))


def make(*group, optimizer="rowwise_adagrad", state_format="fp32", **more):
    groups = (Group("v", 4, 0.1, *group, **more),)
    return DynamicTableConfig("user", ("u",), groups, RowOptimizer(optimizer, state_format=state_format))


MISTAKES = {
    "groups.v.format is 'int9'; expected fp32, fp16, bf16, int8, int4 or int2; did you mean int8?": (
        ("int9",), {}),
    "groups.v.rounding is 'near'; expected stochastic or nearest; did you mean nearest?": (("int8", "near"), {}),
    "groups.v.scale is 0; expected a number above 0": (("int8", "nearest", 0), {}),
    "groups.v.scale is -0.1; expected a number above 0": (("int8", "nearest", -0.1), {}),
    "groups.v.format is 'int4'; expected fp32, fp16 or bf16 with optimizer ftrl": (("int4",), {"optimizer": "ftrl"}),
    "groups.v.format is 'bf16'; expected int8, int4 or int2 with a learned scale": (
        ("bf16",), {"learned": LEARNED}),
    "groups.v.learned.lr is 0; expected a number above 0": (("int8",), {"learned": ScaleOptimizer(0)}),
    "groups.v.learned.weight_decay is -1; expected at least 0": (
        ("int8",), {"learned": ScaleOptimizer(weight_decay=-1)}),
    "optimizer.state_format is 'int8'; expected fp32 or bf16": (("int8",), {"state_format": "int8"}),
    "optimizer.state_format is 'bf16'; expected fp32 for rowwise_adagrad": (("int8",), {"state_format": "bf16"}),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line(message):
    group, more = MISTAKES[message]
    with pytest.raises(ConfigError) as error:
        make(*group, **more)
    assert str(error.value).startswith(f"table user: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adam"])
def test_weight_decay_of_scales_is_scaled_as_their_gradient(backend, optimizer):
    """Without a gradient it is the gradient: SGD shrinks scales by rate * scale * decay, and the others, which
    divide the scale away, move them by the rate. Decay beside an unscaled one would halve them at once."""
    learned = ScaleOptimizer(lr=1e-4, weight_decay=0.05, gradient_scale=1e-3)
    config = DynamicTableConfig(
        "t", ("f",), (Group("v", 4, 0.1, "int8", scale=0.01, learned=learned),), RowOptimizer(optimizer, lr=0.1)
    )
    table, ids = DynamicTable(config), torch.arange(10)
    for now in range(50):
        rows = table.lookup(ids, now)
        ahead = table.begin_update(rows, torch.zeros(10, 4), ids=ids)
        ahead.learn(torch.zeros(10, 4))
    (found,) = (batch.scale[:, 0] for batch in table.export_rows())
    if optimizer == "sgd":
        assert found.tolist() == pytest.approx([0.01 * (1 - 1e-4 * 1e-3 * 0.05) ** 50] * 10, rel=1e-5)
    else:
        assert (found > 0.01 - 50 * 1.01e-4).all() and (found < 0.0099).all()
