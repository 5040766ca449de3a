"""Sharded static tables against the same model written with plain tensors, on 1 and 2 ranks."""

from functools import partial

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tessera.distributed.sharding import shard
from tessera.distributed.static_tables import StaticTables, stored_dim
from tessera.embedding.config import TableConfig
from tessera.embedding.errors import ConfigError
from tessera.embedding.optim import RowOptimizer
from tessera.kernels.mix import mix64
from tessera.kernels.random import normal
from tests.ranks import on_ranks

ROWS, SEED, LR, EPS, BATCH = 50, 3, 0.1, 1e-8, 8
IDS = ["a", "b", "c"]


class Model(torch.nn.Module):
    """Two groups over three features, of which b and c share a table and b is averaged; one dense weight per output."""

    def __init__(self):
        super().__init__()
        self.groups = {
            group: [
                TableConfig(f"a_{group}", dim, ("a",), 0.5),
                TableConfig(f"bc_{group}", dim, ("b", "c"), 0.5),
            ]
            for group, dim in {"v": 4, "w": 1}.items()
        }
        optimizer = RowOptimizer("rowwise_adagrad", lr=LR, eps=EPS)
        self.tables = StaticTables(self.groups, IDS, ROWS, optimizer, SEED, averaged=["b"])
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.nn.Parameter(torch.randn(3 * 5, generator=generator))

    def forward(self, ids):
        out = self.tables(ids)
        return (torch.cat([out["v"].flatten(1), out["w"].flatten(1)], 1) * self.mix).sum(1).square()


def draw_bags(step: int) -> list[list[list[int]]]:
    """[feature][row] -> ids: any 64-bit value, empty bags and repeats among them."""
    generator = torch.Generator().manual_seed(step)
    pool = torch.randint(-(2**62), 2**62, (30,), generator=generator).tolist() + [0, -1, 2**63 - 1, -(2**63)]

    def bag():
        length = int(torch.randint(0, 4, (), generator=generator))
        return [pool[int(torch.randint(0, len(pool), (), generator=generator))] for _ in range(length)]

    return [[bag() for _ in range(BATCH)] for _ in IDS]


def train(process, steps: int, *, ahead: bool = False):
    """ahead: ids of the next batch are sent while a step is trained, and another batch is evaluated between steps."""
    model = Model()
    sharded, plan = shard(model, model.tables, process, BATCH // process.world_size)
    outputs, batches = [], [batch_of(process, step) for step in range(steps)]
    for step, ids in enumerate(batches):
        if ahead and not step:
            model.tables.begin(ids)
        if ahead and step:
            sharded.eval()
            sharded(batches[0])
            sharded.train()
        if ahead and step + 1 < steps:
            model.tables.begin(batches[step + 1])
        out = sharded(ids)
        model.tables.send_begun()
        (out.sum() * process.world_size / BATCH).backward()
        outputs.append(out.detach().tolist())
    return outputs, plan


def batch_of(process, step: int) -> KeyedJaggedTensor:
    """This rank's part."""
    share = BATCH // process.world_size
    mine = [bags[process.rank * share : (process.rank + 1) * share] for bags in draw_bags(step)]
    flat = [bag for bags in mine for bag in bags]
    return KeyedJaggedTensor(
        keys=IDS,
        values=torch.tensor([i for bag in flat for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in flat], dtype=torch.int32),
    )


def reference(steps: int) -> list[list[float]]:
    """Row by row, by the definition of row-wise Adagrad: state += mean(g^2); row -= lr g / (sqrt(state) + eps)."""
    model = Model()
    rows, state = {}, {}
    for table in model.tables.tables:
        width = stored_dim(table.dim)
        rows[table.name] = normal(SEED, table.key, torch.arange(ROWS), width) * 0.5
        state[table.name] = torch.zeros(ROWS)
    outputs = []
    for step in range(steps):
        leaves = {name: value.clone().requires_grad_() for name, value in rows.items()}
        bags, parts = draw_bags(step), []
        for tables in model.groups.values():
            for name in IDS:
                table = next(t for t in tables if name in t.features)
                for bag in bags[IDS.index(name)]:
                    index = torch.remainder(mix64(torch.tensor(bag, dtype=torch.int64)), ROWS)
                    pooled = leaves[table.name][index][:, : table.dim].sum(0)
                    parts.append(pooled / max(1, len(bag)) if name == "b" else pooled)
        per_field = [torch.stack(parts[i * BATCH : (i + 1) * BATCH]) for i in range(6)]
        out = (torch.cat(per_field, 1) * model.mix.detach()).sum(1).square()
        (out.sum() / BATCH).backward()
        outputs.append(out.detach().tolist())
        for name, leaf in leaves.items():
            touched = leaf.grad.abs().sum(1) > 0
            state[name] += leaf.grad.square().mean(1)
            step_size = LR / (state[name][touched].sqrt() + EPS)
            rows[name][touched] -= step_size[:, None] * leaf.grad[touched]
    return outputs


@pytest.mark.parametrize("world", [1, 2])
def test_training_equals_plain_tensors(world):
    results = on_ranks(world, train, 4)
    expected = reference(4)
    for step in range(4):
        got = [value for outputs, _ in results for value in outputs[step]]
        assert got == pytest.approx(expected[step], rel=2e-5, abs=1e-6)
    assert on_ranks(world, partial(train, ahead=True), 4) == results


def test_the_plan_names_every_table_and_its_bytes():
    (_, plan), _ = on_ranks(2, train, 1)
    for name in ("a_v", "bc_v", "a_w", "bc_w"):
        assert f"\n{name} " in plan
    assert "in all 3.9 KiB, 2.0 KiB per rank" in plan


def shard_with(process, name, rows):
    model = Model()
    try:
        model.tables = StaticTables(model.groups, IDS, rows, RowOptimizer(name), SEED)
        shard(model, model.tables, process, 8)
    except ConfigError as error:
        return str(error)


def test_mistakes_are_one_line():
    (unknown,) = on_ranks(1, shard_with, "adamm", ROWS)
    assert unknown.startswith("optimizer.sparse.name is 'adamm'; static tables have sgd, adagrad, rowwise_adagrad")
    (too_big,) = on_ranks(1, shard_with, "sgd", 10**12)
    assert too_big.startswith("the tables do not fit: ") and "embedding.rows" in too_big and "\n" not in too_big
