"""Helen's steps on sharded tables: against the published algorithm written over dense float64 tables, SAM for each
table, plain steps, and any number of ranks."""

from collections import Counter
from contextlib import suppress

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.sharding import shard
from tessera.embedding.config import Admission, DynamicTableConfig, Group, key_of
from tessera.embedding.optim import RowOptimizer
from tessera.kernels.random import normal
from tests.ranks import on_ranks

SEED, BATCH, IDS, VOCABULARY = 3, 16, ["a", "b"], 20
GROUPS = (Group("v", 4, 0.5), Group("w", 1, 0.25))
LR, BETAS, EPS = 0.01, (0.9, 0.999), 1e-8
MIX = torch.linspace(-1, 1, 10)


def tables_of(optimizer="adam", formats=("fp32", "fp32"), admission=None):
    groups = tuple(
        Group(one.name, one.dim, one.init_std, format, scale=2.0**-6)
        for one, format in zip(GROUPS, formats, strict=True)
    )
    rows = RowOptimizer(optimizer, lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
    return [DynamicTableConfig(name, (name,), groups, rows, SEED, admission or Admission()) for name in IDS]


def draw_ids(step):
    """[features, BATCH]; low ids are frequent."""
    drawn = torch.rand((2, BATCH), generator=torch.Generator().manual_seed(step))
    return (drawn.square() * VOCABULARY).long()


def kjt(ids_fb):
    return KeyedJaggedTensor(IDS, ids_fb.flatten(), lengths=torch.ones(ids_fb.numel(), dtype=torch.int32))


def loss_of(out):
    """A sum over rows whose curvature is not the same everywhere."""
    return (1.5 - (out * MIX.to(out)).sum(1)).exp().sum()


class Model(torch.nn.Module):
    def __init__(self, tables, bags=()):
        super().__init__()
        self.tables = DynamicTables(tables, IDS, 100, bag_tables=bags)

    def forward(self, ids):
        out = self.tables(ids)
        return torch.cat([out["v"].flatten(1), out["w"].flatten(1)], 1)


def train(process, steps, rho, xi, tables=None, bags=(), loss=loss_of):
    """Steps by `rho`; None: steps of one pass. Returns the outputs of both passes by step and the rows by table, id."""
    model = Model(tables or tables_of(), bags)
    sharded, _ = shard(model, model.tables, process, BATCH)
    share, outputs = BATCH // process.world_size, []
    mine = slice(process.rank * share, (process.rank + 1) * share)
    for step in range(steps):
        ids = kjt(draw_ids(step)[:, mine])
        model.tables.begin_step(step, perturbs=rho is not None)
        out = sharded(ids)
        outputs.append(out.detach())
        (loss(out) * process.world_size).backward()
        if rho is not None:
            model.tables.perturb(rho, xi)
            with model.tables.second_pass():
                out = model(ids)
                outputs.append(out.detach())
                (loss(out) * process.world_size).backward()
    return torch.stack(outputs) if steps else None, rows_of(model.tables)


def rows_of(tables):
    """(table, id) -> values, state, time and count of its row."""
    found = {}
    for name, table in tables.owned().items():
        for batch in table.export_rows():
            values = table.gather(batch.rows)
            for place, i in enumerate(batch.ids.tolist()):
                row = (values[place], batch.state[place], batch.last_seen[place].item(), batch.count[place].item())
                found[name, i] = row
    return found


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key][0], other[key][0])
        and torch.equal(one[key][1], other[key][1])
        and one[key][2:] == other[key][2:]
        for key in one
    )


def published(steps, rho, xi):
    """Helen over whole tables, one for each field and group, in float64: counts and norms as in the published code,
    whose sums over all rows of a table are those over touched ones where there is no L2. Adam moves touched rows."""
    names = [(name, group) for name in IDS for group in GROUPS]
    everyone = torch.arange(VOCABULARY)
    weights = [
        (normal(SEED, key_of(f"{name}_{one.name}"), everyone, one.dim) * one.init_std).double().requires_grad_()
        for name, one in names
    ]
    firsts, seconds = [torch.zeros_like(one) for one in weights], [torch.zeros_like(one) for one in weights]
    rows_steps = [torch.zeros(VOCABULARY, 1, dtype=torch.float64) for _ in weights]
    outputs = []

    def forward(ids, weights):
        rows = [weights[place][ids[place // 2]] for place in range(4)]
        return torch.cat([rows[0], rows[2], rows[1], rows[3]], 1)

    for step in range(steps):
        ids = draw_ids(step)
        out = forward(ids, weights)
        outputs.append(out.detach())
        moved = []
        for place, (weight, g) in enumerate(zip(weights, torch.autograd.grad(loss_of(out), weights), strict=True)):
            n = torch.bincount(ids[place // 2], minlength=VOCABULARY).double()
            share = (n / n.max()).clamp(min=xi) if xi < 1 else torch.ones(VOCABULARY).double()
            moved.append((weight + rho * share[:, None] * g / (g.norm() + 1e-12)).detach().requires_grad_())
        out = forward(ids, moved)
        outputs.append(out.detach())
        for place, g in enumerate(torch.autograd.grad(loss_of(out), moved)):
            touched = torch.bincount(ids[place // 2], minlength=VOCABULARY)[:, None] > 0
            rows_steps[place] += touched
            firsts[place] = torch.where(touched, BETAS[0] * firsts[place] + (1 - BETAS[0]) * g, firsts[place])
            seconds[place] = torch.where(touched, BETAS[1] * seconds[place] + (1 - BETAS[1]) * g * g, seconds[place])
            n = rows_steps[place].clamp(min=1)
            mean, square = firsts[place] / (1 - BETAS[0] ** n), seconds[place] / (1 - BETAS[1] ** n)
            with torch.no_grad():
                weights[place] -= touched * LR * mean / (square.sqrt() + EPS)
    return torch.stack(outputs), {
        (name, i): torch.cat([weights[2 * k][i], weights[2 * k + 1][i]]).detach()
        for k, name in enumerate(IDS)
        for i in range(VOCABULARY)
    }


@pytest.mark.parametrize("xi", [0.3, 1.0])
def test_fifty_steps_equal_the_published_algorithm_and_sam_for_each_table(xi):
    ((outputs, rows),) = on_ranks(1, train, 50, 0.5, xi)
    expected, weights = published(50, 0.5, xi)
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-3, atol=2e-4)
    for key, row in rows.items():
        torch.testing.assert_close(row[0].double(), weights[key], rtol=1e-3, atol=2e-4)
    other, _ = published(50, 0.5, 0.65)
    assert (other - expected).abs().max() > 0.02, "the bound matters"


def integers(out):
    """Gradients that are small integers times a power of two: they sum up to the same in any order."""
    return (out * (torch.arange(10) % 5 - 2)).sum() / 16


@pytest.mark.parametrize("bags", [(), pytest.param(("b",), marks=pytest.mark.slow)])
def test_one_and_two_ranks_give_the_same_bits_and_plain_steps_are_those_of_rho_0(bags):
    ((out, rows),) = on_ranks(1, train, 4, 0.5, 0.3, None, bags, integers)
    parts = on_ranks(2, train, 4, 0.5, 0.3, None, bags, integers)
    assert torch.equal(torch.cat([part for part, _ in parts], 1), out)
    assert same_bits(parts[0][1] | parts[1][1], rows)
    ((still, at_zero),) = on_ranks(1, train, 4, 0.0, 0.3, None, bags)
    ((plain, once),) = on_ranks(1, train, 4, None, 0.3, None, bags)
    assert torch.equal(still[0::2], plain) and torch.equal(still[1::2], plain)
    assert same_bits(at_zero, once), "moments, counts and times move once a step"


def perturbations(process, tables):
    """eps of id 1 in table a, which each rank has once, beside id 2, which rank 0 has four times."""
    model = Model(tables)
    sharded, _ = shard(model, model.tables, process, BATCH)
    ids = kjt(torch.tensor([[1, 2, 2, 2, 2], [7] * 5] if process.rank == 0 else [[1, 3, 4, 5, 6], [7] * 5]))
    model.tables.begin_step(0, perturbs=True)
    first = sharded(ids)
    (first.sum() * process.world_size).backward()
    model.tables.perturb(0.05, 0.1)
    stored = rows_of(model.tables)
    with model.tables.second_pass():
        second = model(ids)
        (second.sum() * process.world_size).backward()
    return (second - first).detach(), stored


@pytest.mark.parametrize("formats", [pytest.param(("fp32", "fp32"), marks=pytest.mark.slow), ("int8", "fp16")])
def test_an_id_on_two_ranks_counts_both_and_low_precision_rounds_nothing_away(formats):
    found = on_ranks(2, perturbations, tables_of("sgd", formats))
    # Gradients of v and w are as often as ids are there: 2, 4, 1, 1, 1, 1.
    shares = {1: (2 / 4) * 2, 2: 1.0 * 4, 3: (1 / 4) * 1}
    for dim, columns in ((4, slice(0, 4)), (1, slice(8, 9))):
        norm = (dim * (2**2 + 4**2 + 4 * 1**2)) ** 0.5
        for rank, place, i in ((0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 3)):
            eps = found[rank][0][place, columns]
            torch.testing.assert_close(eps, torch.full((dim,), 0.05 * shares[i] / norm), rtol=1e-4, atol=1e-7)


def failing(process):
    """Steps of which every other fails in its second pass, at a place of its own."""
    model = Model(tables_of("sgd", admission=Admission(kind="exact", threshold=2)))
    sharded, _ = shard(model, model.tables, process, BATCH)
    for step in range(4):
        ids = kjt(draw_ids(step))
        model.tables.begin_step(step, perturbs=True)
        first = sharded(ids)
        loss_of(first).backward()
        before = rows_of(model.tables)
        model.tables.perturb(0.5, 0.3)
        with suppress(KeyError), model.tables.second_pass():
            out = model(ids)
            assert not torch.equal(out, first)
            assert torch.equal(out[first == 0], first[first == 0]), "ids without a row have nothing to perturb"
            if step % 2 == 0:
                raise KeyError
            loss_of(out).backward()
        assert same_bits(rows_of(model.tables), before) is (step % 2 == 0)
        model.eval()
        assert step % 2 or torch.equal(model(ids)[first != 0], first[first != 0])
        model.train()
    return True


def test_a_second_pass_that_fails_leaves_rows_as_they_were():
    assert on_ranks(1, failing) == [True]


class Counted(TorchDispatchMode):
    """Counts collectives by name, and all operations."""

    def __init__(self):
        super().__init__()
        self.collectives, self.ops = Counter(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops += 1
        if op.namespace == "c10d":
            self.collectives[op._schema.name.removeprefix("c10d::")] += 1
        return op(*args, **(kwargs or {}))


def counted(process, passes, tables):
    perturbs = passes == 2
    names = [f"t{number}" for number in range(tables)]
    configs = [DynamicTableConfig(name, (name,), GROUPS) for name in names]
    module = DynamicTables(configs, names, expected_rows=100)
    sharded, _ = shard(module, module, process, BATCH)
    lengths = torch.ones(BATCH * tables, dtype=torch.int32)
    for step in range(3):
        batch = KeyedJaggedTensor(names, torch.arange(BATCH).repeat(tables), lengths=lengths)
        with Counted() as count:
            module.begin_step(step, perturbs=perturbs)
            out = sharded(batch)
            (out["v"].sum() + out["w"].sum()).backward()
            if perturbs:
                module.perturb(0.05, 0.3)
                with module.second_pass():
                    out = module(batch)
                    (out["v"].sum() + out["w"].sum()).backward()
    return dict(count.collectives), count.ops


@pytest.mark.slow
def test_a_step_sends_rows_and_gradients_twice_ids_once_and_one_message_of_norms():
    (plain, ops), _ = on_ranks(2, counted, 1, 3)
    (twice, more), _ = on_ranks(2, counted, 2, 3)
    assert plain == {"alltoall_base_": 3}, "ids, rows, gradients"
    assert twice == {"alltoall_base_": 5, "_allgather_base_": 1}
    (_, many), _ = on_ranks(2, counted, 2, 60)
    assert many <= more + 4 and more <= ops + 120, (ops, more, many)
