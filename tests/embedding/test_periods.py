"""Old rows learn at another rate than those added since the period began: against a dictionary of one-row tables."""

import dataclasses

import pytest
import torch

from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.errors import ConfigError
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.table import DynamicTable
from tests.embedding.conftest import both_kinds

pytestmark = [both_kinds, pytest.mark.usefixtures("of_table")]

LR, FACTOR, TTL = 0.1, 0.3, 3
STEPS_OF_PERIOD, STEPS = 4, 14
FORMATS = {
    "fp32": {},
    "bf16": {"format": "bf16"},
    "int8": {"format": "int8", "scale": 0.02},
    "alpt": {"format": "int8", "scale": 0.02, "learned": ScaleOptimizer(lr=1e-3)},
}


def config_of(optimizer: str, kind: str, factor: float = FACTOR) -> DynamicTableConfig:
    groups = (Group("v", 4, 0.5, **FORMATS[kind]), Group("w", 1, 0.5))
    rows = RowOptimizer(optimizer, lr=LR, weight_decay=0.01, old_rows_factor=factor)
    return DynamicTableConfig("t", ("f",), groups, rows, seed=3, chunk_rows=16, ttl_seconds=TTL)


def gradients(step: int) -> dict[int, torch.Tensor]:
    """id -> float32 [5]: always the ids of the pool that exist so far; some only now and then, so that they expire."""
    generator = torch.Generator().manual_seed(step)
    pool = [i for i in range(4 + step) if i < 3 or (i + step) % 6 < 2]
    return {i * 7919: torch.randn(5, generator=generator) for i in pool}


def train(table: DynamicTable, ids: list[int], grads: list[torch.Tensor], step: int, lr: float | None, learn: bool):
    """One step; ids: those of the batch, each three times in it."""
    rows = table.lookup(torch.tensor(ids, dtype=torch.int64), step)
    if not ids:
        return
    inverse = torch.arange(len(ids)).repeat(3)
    every = torch.cat([torch.stack(grads) * scale for scale in (1.0, -0.37, 0.71)])
    if learn:
        update = table.begin_update(rows, every, inverse, lr)
        update.learn(update.gather(inverse) * every, inverse)
    else:
        table.update(rows, every, inverse, lr)


def content(table: DynamicTable) -> dict[int, tuple]:
    batch = table.read_rows(table.rows_in_use())
    columns = [batch.values, batch.state, batch.last_seen, batch.count]
    columns += [] if batch.scale is None else [batch.scale]
    return {
        i: tuple(column[place].numpy().tobytes() for column in columns) for place, i in enumerate(batch.ids.tolist())
    }


CASES = [("rowwise_adagrad", "fp32"), ("adam", "bf16"), ("rowwise_adagrad", "int8"), ("adam", "alpt")]
MORE = [("sgd", "fp32"), ("adagrad", "fp32"), ("adam", "fp32"), ("sgd", "alpt")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("optimizer", "kind"), CASES)
def test_each_row_learns_at_the_rate_of_its_age(backend, optimizer, kind):
    """Bit for bit as tables of one row that are told the rate; an id that comes back after it expired is new again."""
    table, alone, added, came_back = DynamicTable(config_of(optimizer, kind)), {}, {}, 0
    for step in range(STEPS):
        period = step // STEPS_OF_PERIOD
        if step and step % STEPS_OF_PERIOD == 0:
            table.begin_period()
        if step == 6:  # a twin made of rows and state goes on for the table
            twin = DynamicTable(table.config)
            twin.import_state(table.export_state())
            for batch in table.export_rows(3):
                twin.import_rows(batch)
            table = twin
        grads, learn = gradients(step), kind == "alpt" and step % 2 == 0
        train(table, list(grads), list(grads.values()), step, LR, learn)
        table.expire(step)
        for i in grads:
            if i not in alone:
                # Rounding draws by the step of the table.
                alone[i] = DynamicTable(config_of(optimizer, kind, factor=1.0))
                alone[i].import_state({"step": torch.tensor(step)})
            if len(alone[i]) == 0:
                came_back += i in added
                added[i] = period
        for i, one in alone.items():
            mine = [i] if i in grads else []
            rate = LR * FACTOR if added[i] < period else LR
            train(one, mine, [grads[j] for j in mine], step, rate, learn)
            one.expire(step)
    found = content(table)
    expected = {i: row for one in alone.values() for i, row in content(one).items()}
    assert found == expected and len(found) > 5 and came_back
    assert {added[i] for i in found} >= {0, 3}


def test_the_factor_needs_an_optimizer_whose_state_does_not_hold_the_rate():
    with pytest.raises(ConfigError, match=r"optimizer.old_rows_factor is 0.3; expected 1 for ftrl"):
        config_of("ftrl", "fp32")
    with pytest.raises(ConfigError, match=r"optimizer.old_rows_factor is 0.0; expected a number above 0"):
        config_of("sgd", "fp32", factor=0.0)


def test_rows_without_a_period_are_old_and_only_tables_with_a_factor_keep_one():
    table, plain = DynamicTable(config_of("sgd", "fp32")), DynamicTable(config_of("sgd", "fp32", factor=1.0))
    ids = torch.arange(3)
    for one in (table, plain):
        one.lookup(ids, 0)
    kept, none = table.read_rows(table.rows_in_use()), plain.read_rows(plain.rows_in_use())
    assert kept.period.tolist() == [0, 0, 0] and none.period is None
    assert table.config.record.meta_at == plain.config.record.meta_at + 8
    assert "period" in table.export_state() and "period" not in plain.export_state()
    other = DynamicTable(table.config)
    other.import_rows(RowBatch(none.ids, none.values, none.state, none.last_seen, none.count))
    rows = other.lookup(torch.arange(6), 0)
    before = other.gather(rows)
    other.update(rows, torch.ones(6, 5))
    moved = other.gather(rows) - before * (1 - LR * 0.01)
    torch.testing.assert_close(moved[3:], torch.full((3, 5), -LR), atol=1e-3, rtol=0)
    torch.testing.assert_close(moved[:3], torch.full((3, 5), -LR * FACTOR), atol=1e-3, rtol=0)


INIT = torch.tensor([0.37, -0.5, 0.004, 0.11])


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16", "int8", "int4", "int2"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_new_rows_begin_with_given_values_in_every_format(backend, format, rounding):
    """Each as near as its format can say; on average exactly, where rounding is by lot."""
    groups = (Group("v", 4, 0.5, format, rounding, scale=1e-3),)
    config = DynamicTableConfig("t", ("f",), groups, RowOptimizer("adagrad", initial_accumulator=0.25), chunk_rows=64)
    table = DynamicTable(config)
    table.init_values = INIT
    ids = torch.arange(4000)
    rows = table.lookup(ids, 0)
    values, batch = table.gather(rows), table.read_rows(rows)
    step = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}.get(format)
    if step is None:
        low, high = {"int8": (-128, 127), "int4": (-8, 7), "int2": (-2, 1)}[format]
        step = max(1e-3, 0.37 / high, 0.5 / -low)  # the smallest that reaches all values
        torch.testing.assert_close(batch.scale, torch.full((4000, 1), step))
    assert (values - INIT).abs().max() <= step * (0.5 if rounding == "nearest" else 1) + 1e-7
    if rounding == "stochastic" and step:
        assert (values.mean(0) - INIT).abs().max() < 4 * step / 2 / 4000**0.5
    assert torch.equal(batch.state, torch.full((4000, 4), 0.25))
    table.init_values = -INIT  # of rows that come later
    later = table.gather(table.lookup(torch.tensor([9000]), 1))
    assert (later + INIT).abs().max() <= 2 * step + 1e-7
    assert torch.equal(table.gather(rows), values)


def test_begin_period_changes_nothing_without_a_factor():
    config = dataclasses.replace(config_of("adam", "fp32", factor=1.0))
    one, other = DynamicTable(config), DynamicTable(config)
    for step in range(4):
        other.begin_period()
        grads = gradients(step)
        for table in (one, other):
            train(table, list(grads), list(grads.values()), step, None, learn=False)
    assert content(one) == content(other)
