"""Sharded dynamic tables against one dictionary of rows, on 1, 2 and 3 ranks."""

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.saved.states import open_saved, save
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableSaver, describe_tables, load_rows
from tessera.distributed.sharding import shard
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.kernels.message import owner_of
from tessera.kernels.mix import mix64
from tessera.kernels.random import normal
from tests.ranks import on_ranks

SEED, LR, EPS, BATCH, STEPS = 3, 0.1, 1e-8, 12, 4
IDS = ["a", "b", "c"]
OPTIMIZER = RowOptimizer("rowwise_adagrad", lr=LR, eps=EPS)
GROUPS = (Group("v", 4, 0.5), Group("w", 1, 0.5))
TABLES = [
    DynamicTableConfig("a", ("a",), GROUPS, OPTIMIZER, seed=SEED),
    DynamicTableConfig("bc", ("b", "c"), GROUPS, OPTIMIZER, seed=SEED),
]


class Model(torch.nn.Module):
    """Two groups over three features, of which b and c share a table and b is averaged; one dense weight per output."""

    def __init__(self, by_host=False):
        super().__init__()
        self.tables = DynamicTables(TABLES, IDS, expected_rows=100, averaged=["b"], by_host=by_host)
        self.mix = torch.nn.Parameter(torch.randn(3 * 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids):
        out = self.tables(ids)
        return (torch.cat([out["v"].flatten(1), out["w"].flatten(1)], 1) * self.mix).sum(1).square()


def draw_bags(step: int) -> list[list[list[int]]]:
    """[feature][row] -> ids: any 64-bit value, empty bags and repeats among them; new ids in every step."""
    generator = torch.Generator().manual_seed(step)
    pool = torch.randint(-(2**62), 2**62, (20,), generator=generator).tolist() + [0, -1, 2**63 - 1, -(2**63)]

    def bag():
        length = int(torch.randint(0, 4, (), generator=generator))
        return [pool[int(torch.randint(0, len(pool), (), generator=generator))] for _ in range(length)]

    return [[bag() for _ in range(BATCH)] for _ in IDS]


def to_kjt(bags: list[list[list[int]]]) -> KeyedJaggedTensor:
    flat = [bag for feature in bags for bag in feature]
    return KeyedJaggedTensor(
        keys=IDS,
        values=torch.tensor([i for bag in flat for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in flat], dtype=torch.int32),
    )


def share_of(process, bags):
    share = BATCH // process.world_size
    return to_kjt([feature[process.rank * share : (process.rank + 1) * share] for feature in bags])


def rows_of(tables: DynamicTables) -> dict[str, dict[int, tuple]]:
    return {
        name: {
            int(i): (v.tolist(), s.tolist(), int(seen), int(count))
            for batch in table.export_rows()
            for i, v, s, seen, count in zip(
                batch.ids, batch.values, batch.state, batch.last_seen, batch.count, strict=True
            )
        }
        for name, table in tables.owned().items()
    }


def save_rows(tables: DynamicTables, folder, process):
    def write(storage: Storage) -> dict:
        TableSaver(tables.owned()).take(delta=False).write(storage, process)
        return {}

    save(Storage(folder), "state", write, lambda *_: {"tables": describe_tables(tables.owned())}, process)


def train(process, folder=None, by_host=False):
    model = Model(by_host)
    sharded, plan = shard(model, model.tables, process, BATCH // process.world_size)
    outputs = []
    for step in range(STEPS):
        model.tables.begin_step(now=100 + step)
        out = sharded(share_of(process, draw_bags(step)))
        (out.sum() * process.world_size / BATCH).backward()
        outputs.append(out.detach().tolist())
    sharded.eval()
    unseen = sharded(share_of(process, draw_bags(99))).detach().tolist()
    if folder is not None:
        save_rows(model.tables, folder, process)
    return outputs, rows_of(model.tables), unseen, plan


def reference():
    """The same training with a dictionary: (table, id) -> row."""
    model, rows, state, seen, count = Model(), {}, {}, {}, {}
    table_of = {feature: table for table in TABLES for feature in table.features}

    def first(table, i):
        ids = torch.tensor([i])
        return torch.cat([normal(SEED, table.key(g), ids, g.dim)[0] * g.init_std for g in GROUPS])

    def forward(step, leaves, training):
        parts = []
        for feature, feature_bags in zip(IDS, draw_bags(step), strict=True):
            table = table_of[feature]
            for bag in feature_bags:
                total = torch.zeros(5)
                for i in bag:
                    key = (table.name, i)
                    if training and key not in rows:
                        rows[key], state[key], count[key] = first(table, i), torch.zeros(2), 0
                    if training:
                        count[key] += 1
                        seen[key] = 100 + step
                        leaves.setdefault(key, rows[key].clone().requires_grad_())
                        total = total + leaves[key]
                    elif key in rows:
                        total = total + rows[key]
                parts.append(total / max(1, len(bag)) if feature == "b" else total)
        x = torch.stack(parts).view(3, BATCH, 5).transpose(0, 1)
        flat = torch.cat([x[..., :4].flatten(1), x[..., 4:].flatten(1)], 1)
        return (flat * model.mix.detach()).sum(1).square()

    outputs = []
    for step in range(STEPS):
        leaves = {}
        out = forward(step, leaves, training=True)
        (out.sum() / BATCH).backward()
        outputs.append(out.detach().tolist())
        for key, leaf in leaves.items():
            for number, columns in enumerate((slice(0, 4), slice(4, 5))):
                grad = leaf.grad[columns]
                state[key][number] += grad.square().mean()
                rows[key][columns] -= LR * grad / (state[key][number].sqrt() + EPS)
    unseen = forward(99, {}, training=False).tolist()
    return outputs, {key: (rows[key], state[key], seen[key], count[key]) for key in rows}, unseen


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_equals_a_dictionary_of_rows(world):
    results = on_ranks(world, train)
    outputs, rows, unseen = reference()
    for step in range(STEPS):
        got = [value for rank_outputs, *_ in results for value in rank_outputs[step]]
        assert got == pytest.approx(outputs[step], rel=2e-5, abs=1e-6)
    assert [v for *_, u, _ in results for v in u] == pytest.approx(unseen, rel=2e-5, abs=1e-6)
    found = {}
    for rank, (_, tables, *_) in enumerate(results):
        for name, table in tables.items():
            ids = torch.tensor(list(table), dtype=torch.int64)
            assert (owner_of(mix64(ids), world) == rank).all()
            found.update({(name, i): row for i, row in table.items()})
    assert found.keys() == rows.keys()  # each id on one rank, none lost, none that only evaluation saw
    for key, (values, state, seen, count) in rows.items():
        assert found[key][0] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-6)
        assert found[key][1] == pytest.approx(state.tolist(), rel=1e-4, abs=1e-6)
        assert found[key][2:] == (seen, count)


def load(process, folder):
    model = Model()
    shard(model, model.tables, process, BATCH)
    saved = open_saved(Storage(folder / "state"), process)
    load_rows(model.tables.owned(), saved, process)
    return rows_of(model.tables)


def test_rows_saved_by_three_ranks_are_loaded_by_two_and_one(tmp_path):
    saved = [tables for _, tables, *_ in on_ranks(3, train, tmp_path)]
    for world in (2, 1):
        loaded = on_ranks(world, load, tmp_path)
        for name in ("a", "bc"):
            before = {i: row for tables in saved for i, row in tables[name].items()}
            after = {i: row for tables in loaded for i, row in tables[name].items()}
            assert sum(len(tables[name]) for tables in loaded) == len(after)
            assert after == before


def test_the_plan_names_every_table_and_its_bytes():
    ((*_, plan),) = on_ranks(1, train)
    assert "2 tables, row-wise over 1 rank on cpu" in plan
    line = next(line for line in plan.splitlines() if line.startswith("bc "))
    assert line.split()[:4] == ["bc", "100", "5", str(TABLES[1].bytes_per_row)]


def test_owner_is_the_unsigned_value_modulo_the_ranks():
    values = [0, 1, -1, 2**63 - 1, -(2**63), 12345, -98765432109876]
    for world in (1, 2, 3, 7, 16):
        assert owner_of(torch.tensor(values), world).tolist() == [(v % 2**64) % world for v in values]
