"""L2 per look-up: each row of a bag decays by its own value, once for each time that it is looked up."""

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.sharding import shard
from tessera.distributed.static_tables import StaticTables
from tessera.embedding.config import Admission, DynamicTableConfig, Group, TableConfig
from tessera.embedding.optim import RowOptimizer
from tessera.kernels.random import normal
from tests.ranks import on_ranks

NAMES, BATCH, L2, LR = ["user", "seen", "tags"], 12, 0.5, 0.1
TABLES = {"user": ("user",), "item": ("seen", "tags")}  # two features of bags share a table


def bags() -> list[list[list[int]]]:
    """[features][BATCH] bags: one user a row, empty bags, ids that are in a bag twice."""
    generator = torch.Generator().manual_seed(1)

    def draw(least: int, most: int) -> list[list[int]]:
        lengths = torch.randint(least, most + 1, (BATCH,), generator=generator).tolist()
        return [torch.randint(0, 8, (n,), generator=generator).tolist() for n in lengths]

    return [draw(1, 1), draw(0, 4), draw(0, 3)]


def weight_of(feature: int, row: int, place: int) -> float:
    return 1.0 if feature == 0 else 0.25 * (1 + (feature + row + place) % 5)


def pull() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"v": torch.randn(BATCH, 3, 4, generator=generator), "w": torch.randn(BATCH, 3, 1, generator=generator)}


def batch_of(rows: range) -> KeyedJaggedTensor:
    chosen = [[(f, r, bag) for r, bag in enumerate(bags()[f]) if r in rows] for f in range(3)]
    ids = [i for feature in chosen for _, _, bag in feature for i in bag]
    weights = [weight_of(f, r, place) for feature in chosen for f, r, bag in feature for place in range(len(bag))]
    lengths = [len(bag) for feature in chosen for *_, bag in feature]
    return KeyedJaggedTensor(
        NAMES, torch.tensor(ids), torch.tensor(weights), lengths=torch.tensor(lengths, dtype=torch.int32)
    )


def step(process, bag_tables: tuple[str, ...], oov: str):
    groups = (Group("v", 4, 1.0), Group("w", 1, 1.0))
    admission = Admission("exact", 1000) if oov == "learned" else Admission()  # the first time no id has a row
    configs = [
        DynamicTableConfig(name, features, groups, RowOptimizer("sgd", lr=LR), admission=admission)
        for name, features in TABLES.items()
    ]
    model = torch.nn.Module()
    model.tables = DynamicTables(configs, NAMES, 100, averaged=("seen",), oov=oov, bag_tables=bag_tables, squares=True)
    model.forward = model.tables.forward
    sharded, _ = shard(model, model.tables, process, BATCH)
    if oov == "learned":
        with torch.no_grad():
            model.tables.oov.copy_(torch.linspace(-1, 1, 10).view(2, 5))
    share = BATCH // process.world_size
    mine = range(process.rank * share, (process.rank + 1) * share)
    model.tables.begin_step(0)
    found = sharded(batch_of(mine))
    loss = sum((found[group] * pull()[group][mine.start : mine.stop]).sum() for group in found)
    loss = loss + L2 / 2 * model.tables.squares_looked_up(found)
    (loss * process.world_size / BATCH).backward()
    rows = {}
    for name, table in model.tables.owned().items():
        for exported in table.export_rows():
            rows |= {(name, i): row for i, row in zip(exported.ids.tolist(), exported.values, strict=True)}
    return rows, None if oov == "zeros" else model.tables.oov.grad


def by_definition(oov: torch.Tensor | None) -> tuple[dict, torch.Tensor | None]:
    """Loops over look-ups; autograd. Rows that have had no look-up before are `oov`, where that is given."""
    table_of = {feature: name for name, features in TABLES.items() for feature in features}
    rows = {}
    for f, feature in enumerate(NAMES):
        for i in {i for bag in bags()[f] for i in bag}:
            name, one = table_of[feature], torch.tensor([i])
            tables = [TableConfig(f"{name}_{group}", dim, (), 1.0) for group, dim in (("v", 4), ("w", 1))]
            first = [normal(0, table.key, one, table.dim)[0] for table in tables]
            rows.setdefault((name, i), torch.cat(first).requires_grad_())
    oov = None if oov is None else oov.clone().requires_grad_()
    loss = torch.zeros(())
    for f, feature in enumerate(NAMES):
        name = table_of[feature]
        for r, bag in enumerate(bags()[f]):
            looked_up = [rows[name, i] if oov is None else oov[list(TABLES).index(name)] for i in bag]
            pooled = sum((row * weight_of(f, r, place) for place, row in enumerate(looked_up)), torch.zeros(5))
            pooled = pooled / max(1, len(bag)) if feature == "seen" else pooled
            loss = loss + (pooled[:4] * pull()["v"][r, f]).sum() + (pooled[4:] * pull()["w"][r, f]).sum()
            loss = loss + L2 / 2 * sum((row.square().sum() for row in looked_up), torch.zeros(()))
    (loss / BATCH).backward()
    if oov is not None:
        return {}, oov.grad
    return {key: (row - LR * row.grad).detach() for key, row in rows.items()}, None


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("bag_tables", [(), ("item",), ("user", "item")], ids=["rows", "both paths", "sums of owners"])
def test_rows_of_bags_decay_by_themselves(world, bag_tables):
    expected, _ = by_definition(None)
    results = on_ranks(world, step, bag_tables, "zeros")
    found = {key: row for rows, _ in results for key, row in rows.items()}
    assert found.keys() == expected.keys() and sum(len(rows) for rows, _ in results) == len(found)
    for key, row in expected.items():
        torch.testing.assert_close(found[key], row, rtol=1e-5, atol=1e-6, msg=str(key))


@pytest.mark.parametrize("bag_tables", [(), ("item",)], ids=["rows", "both paths"])
def test_the_learned_row_decays_once_for_each_look_up_of_an_id_without_a_row(bag_tables):
    _, expected = by_definition(torch.linspace(-1, 1, 10).view(2, 5))
    for rows, grad in on_ranks(2, step, bag_tables, "learned"):
        assert not rows
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_static_rows_are_their_embeddings():
    groups = {"v": [TableConfig("a_v", 4, ("a",), 0.1)], "w": [TableConfig("a_w", 1, ("a",), 0.1)]}
    tables = StaticTables(groups, ["a"], 10, RowOptimizer("sgd"), 0)
    embeddings = {"v": torch.full((2, 1, 4), 2.0), "w": torch.full((2, 1, 1), 3.0)}
    assert tables.squares_looked_up(embeddings) == 2 * 4 * 4 + 2 * 9
