"""Tables that differ in all that single tables may: random settings, and a dictionary of rows in float64 for them."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.projections import first_projection
from tessera.distributed.sharding import shard
from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.kernels.optimizers import state_width
from tessera.kernels.random import normal
from tessera.kernels.reference.update import step as optimizer_step

SEED, BATCH, STEPS, PERIOD, DENSE_LR = 3, 12, 6, 3, 0.1
IDS = ["a", "b", "c", "d"]
FEATURES = {"a": ("a",), "b c": ("b", "c"), "d": ("d",)}  # by table
DIMS = {"v": 4, "w": 1}
WIDTH = sum(DIMS.values())
# Whatever divides by the size of gradients begins far from 0: there the order of sums alone would move rows.
OPTIMIZERS = {
    "sgd": {"weight_decay": 0.1},
    "adagrad": {"initial_accumulator": 1.0},
    "rowwise_adagrad": {"initial_accumulator": 0.5, "weight_decay": 0.01},
    "adam": {"eps": 0.5, "beta1": 0.8},
    "ftrl": {"l1": 0.01},
}


def draw_table(name: str, draw: random.Random, *, exact: bool) -> DynamicTableConfig:
    """Settings of one table. exact: without what depends on the order of ids or rounds values."""
    kind = draw.choice(list(OPTIMIZERS))
    factor = 1.0 if kind == "ftrl" else draw.choice([1.0, 0.5])
    optimizer = RowOptimizer(kind, lr=draw.choice([0.02, 0.1, 0.3]), old_rows_factor=factor, **OPTIMIZERS[kind])
    formats = ["fp32"] if exact else ["fp32", "fp16", "bf16"] + ["int8", "int4"] * (kind != "ftrl")
    format, dim = draw.choice(formats), draw.randint(1, 4)
    rounding = draw.choice(["nearest", "stochastic"])
    groups = (Group("v", dim, draw.choice([0.1, 0.5]), format, rounding, 0.02), Group("w", 1, 0.3))
    rule = "exact" if exact else draw.choice(["none", "exact", "sliding", "probabilistic"])
    admission = Admission(rule, draw.randint(1, 3), capacity=40)
    full = {} if exact or draw.random() < 0.5 else {"max_rows": 60, "eviction": draw.choice(["lru", "lfu"])}
    ttl = draw.choice([None, 2, 3])
    return DynamicTableConfig(name, FEATURES[name], groups, optimizer, SEED, admission, ttl, chunk_rows=64, **full)


def draw_bags(seed: int, step: int) -> list[list[list[int]]]:
    """[feature][row] -> ids, new ones in every step."""
    draw = random.Random(1000 * seed + step)
    pool = [draw.randrange(-(2**63), 2**63) for _ in range(6)] + list(range(12)) + [-1, 2**63 - 1]
    return [[[draw.choice(pool) for _ in range(draw.randrange(4))] for _ in range(BATCH)] for _ in IDS]


def to_kjt(bags: list[list[list[int]]]) -> KeyedJaggedTensor:
    flat = [bag for feature in bags for bag in feature]
    return KeyedJaggedTensor(
        keys=IDS,
        values=torch.tensor([i for bag in flat for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in flat], dtype=torch.int32),
        stride=len(bags[0]),
    )


class Model(nn.Module):
    """One number per row, the square of a sum over fields; apart: the sum of their squares, so that tables do not
    meet."""

    def __init__(self, tables: list[DynamicTableConfig], *, apart: bool, **options) -> None:
        super().__init__()
        self.tables = DynamicTables(tables, IDS, 100, ["b"], dims=DIMS, **options)
        self.mix = nn.Parameter(torch.randn(len(IDS), WIDTH, generator=torch.Generator().manual_seed(0)))
        self.apart = apart

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        return self.loss(self.tables(ids))

    def loss(self, embeddings: dict[str, Tensor]) -> Tensor:
        x_bf = (torch.cat([embeddings["v"], embeddings["w"]], 2) * self.mix.to(embeddings["v"])).sum(2)
        return x_bf.square().sum(1) if self.apart else x_bf.sum(1).square()


def share(process, bags: list[list[list[int]]]) -> KeyedJaggedTensor:
    rows = BATCH // process.world_size
    return to_kjt([feature[process.rank * rows : (process.rank + 1) * rows] for feature in bags])


def train(process, seed: int, tables: list[DynamicTableConfig], apart: bool, options: dict) -> dict:
    """This rank's outputs by step, its rows, and the dense weights of the tables."""
    model = Model(tables, apart=apart, **options)
    sharded, _ = shard(model, model.tables, process, BATCH // process.world_size)
    # Where a rank's part of a sum over ranks stands depends on what else is summed, and so do its bits.
    outputs, dense_lr = [], 0.0 if apart else DENSE_LR
    for step in range(STEPS):
        if step == PERIOD:
            model.tables.begin_period()
        model.tables.begin_step(now=100 + step)
        out = sharded(share(process, draw_bags(seed, step)))
        (out.sum() * process.world_size / BATCH).backward()
        outputs.append(out.detach().tolist())
        with torch.no_grad():
            for parameter in model.tables.dense_parameters().values():
                parameter -= dense_lr * parameter.grad
                parameter.grad = None
        model.tables.expire(100 + step, everywhere=True)
    sharded.eval()
    with torch.no_grad():
        outputs.append(sharded(share(process, draw_bags(seed, 99))).tolist())
    dense = {name: weight.detach().tolist() for name, weight in model.tables.dense_parameters().items()}
    return {"outputs": outputs, "rows": rows_of(model.tables), "dense": dense}


def rows_of(tables: DynamicTables) -> dict[tuple[str, int], tuple]:
    """(table, id) -> values as they are looked up, state, last seen, count."""
    found = {}
    for name, table in tables.owned().items():
        for batch in table.export_rows():
            values = table.gather(batch.rows)
            columns = (values, batch.state, batch.last_seen, batch.count)
            for place, i in enumerate(batch.ids.tolist()):
                found[name, i] = tuple(column[place].tolist() for column in columns)
    return found


def train_many(process, jobs: list[tuple]) -> list[dict]:
    return [train(process, *job) for job in jobs]


def joined(results: list[dict]) -> dict:
    """What `train` gave on each rank, as one."""
    rows = {key: row for result in results for key, row in result["rows"].items()}
    assert len(rows) == sum(len(result["rows"]) for result in results)
    assert all(result["dense"] == results[0]["dense"] for result in results)
    outputs = [[v for result in results for v in result["outputs"][step]] for step in range(STEPS + 1)]
    return {"outputs": outputs, "rows": rows, "dense": results[0]["dense"]}


class Dictionary:
    """The same training on one rank in float64: (table, id) -> row, and a dense definition of the projection, in which
    each id's own row is projected before bags are summed."""

    def __init__(self, seed: int, tables: list[DynamicTableConfig], apart: bool, options: dict) -> None:
        self.seed, self.tables = seed, tables
        self.model = Model(tables, apart=apart, **options)
        self.oov = torch.zeros(len(tables), WIDTH, dtype=torch.float64, requires_grad=True)
        self.learns_oov, self.begins_as_oov = options.get("oov") == "learned", options.get("init") == "oov"
        self.matrices = {
            t.name: first_projection(t, t.groups[0], DIMS["v"]).double().requires_grad_()
            for t in tables
            if t.groups[0].dim < DIMS["v"]
        }
        self.rows: dict[tuple[str, int], Tensor] = {}
        self.state, self.seen, self.count, self.added, self.waiting = {}, {}, {}, {}, {}

    def train(self) -> dict:
        outputs = []
        for step in range(STEPS):
            self._admit(step)
            leaves = {key: row.clone().requires_grad_() for key, row in self.rows.items()}
            out = self._forward(step, leaves)
            (out.sum() / BATCH).backward()
            outputs.append(out.tolist())
            for table in self.tables:
                for key in [key for key in leaves if key[0] == table.name and self.seen[key] == 100 + step]:
                    self._update(table, key, leaves[key].grad, step)
            with torch.no_grad():
                for weight in [self.oov, *self.matrices.values()]:
                    if weight.grad is not None:
                        weight -= DENSE_LR * weight.grad
                        weight.grad = None
            self._expire(100 + step)
        with torch.no_grad():
            outputs.append(self._forward(99, self.rows).tolist())
        dense = {f"tables.projections.{name}_v": matrix.tolist() for name, matrix in self.matrices.items()}
        dense |= {"tables.others": self.oov.tolist()} if self.learns_oov else {}
        rows = {key: (row.tolist(), self.state[key].tolist(), self.seen[key], self.count[key])
                for key, row in self.rows.items()}  # fmt: skip
        return {"outputs": outputs, "rows": rows, "dense": dense}

    def _admit(self, step: int) -> None:
        bags = dict(zip(IDS, draw_bags(self.seed, step), strict=True))
        for table in self.tables:
            asked = [i for name in table.features for bag in bags[name] for i in bag]
            for i in dict.fromkeys(asked):
                key, times = (table.name, i), asked.count(i)
                if key not in self.rows:
                    before, _ = self.waiting.get(key, (0, 0))
                    self.waiting[key] = (before + times, 100 + step)
                    if before + times < table.admission.threshold:
                        continue
                    del self.waiting[key]
                    self._add(table, key, step)
                self.count[key] += times
                self.seen[key] = 100 + step

    def _add(self, table: DynamicTableConfig, key: tuple[str, int], step: int) -> None:
        one = torch.tensor([key[1]])
        parts = [normal(SEED, table.key(g), one, g.dim)[0] * g.init_std for g in table.groups]
        widths = [state_width(table.optimizer.name, g.dim) for g in table.groups]
        first = table.optimizer.initial_accumulator
        values = self._oov(self.tables.index(table)).detach().clone() if self.begins_as_oov else torch.cat(parts)
        self.rows[key], self.count[key], self.added[key] = values.double(), 0, step
        self.state[key] = torch.full((sum(widths),), first, dtype=torch.float64)

    def _forward(self, step: int, rows: dict[tuple[str, int], Tensor]) -> Tensor:
        table_of = {name: number for number, table in enumerate(self.tables) for name in table.features}
        fields = []
        for name, bags in zip(IDS, draw_bags(self.seed, step), strict=True):
            number = table_of[name]
            for bag in bags:
                vectors = [self._vector(number, i, rows) for i in bag]
                total = sum(vectors, torch.zeros(WIDTH, dtype=torch.float64))
                fields.append(total / max(1, len(bag)) if name == "b" else total)
        x = torch.stack(fields).view(len(IDS), BATCH, WIDTH).transpose(0, 1)
        return self.model.loss({"v": x[..., :4], "w": x[..., 4:]})

    def _vector(self, number: int, i: int, rows: dict[tuple[str, int], Tensor]) -> Tensor:
        table = self.tables[number]
        dim, row = table.groups[0].dim, rows.get((table.name, i))
        if row is None:
            row = self._oov(number) if self.learns_oov else torch.zeros(dim + 1, dtype=torch.float64)
        v = row[:dim] @ self.matrices[table.name] if table.name in self.matrices else row[:dim]
        return torch.cat([v, row[dim:]])

    def _oov(self, number: int) -> Tensor:
        """A table's learned row, which has places for all columns of the tower."""
        return torch.cat([self.oov[number, : self.tables[number].groups[0].dim], self.oov[number, DIMS["v"] :]])

    def _update(self, table: DynamicTableConfig, key: tuple[str, int], grad: Tensor, step: int) -> None:
        optimizer, column, place = table.optimizer, 0, 0
        old = self.added[key] < PERIOD <= step
        settings = optimizer.settings(optimizer.lr * (optimizer.old_rows_factor if old else 1))
        for group in table.groups:
            width = state_width(optimizer.name, group.dim)
            w, state = self.rows[key][column : column + group.dim], self.state[key][place : place + width]
            optimizer_step(
                optimizer.name, w[None], state[None], grad[None, column : column + group.dim], tuple(settings)
            )
            column, place = column + group.dim, place + width

    def _expire(self, now: int) -> None:
        for table in self.tables:
            if table.ttl_seconds is None:
                continue
            for key in [k for k in self.rows if k[0] == table.name and now - self.seen[k] >= table.ttl_seconds]:
                for part in (self.rows, self.state, self.seen, self.count, self.added):
                    del part[key]
            for key in [k for k, (_, seen) in self.waiting.items() if k[0] == table.name]:
                if now - self.waiting[key][1] >= table.ttl_seconds:
                    del self.waiting[key]


def draw_job(seed: int, *, exact: bool) -> tuple[int, list[DynamicTableConfig], bool, dict]:
    """Arguments of `train` behind the process."""
    draw = random.Random(seed)
    tables = [draw_table(name, draw, exact=exact) for name in FEATURES]
    bags = [name for name in FEATURES if draw.random() < 0.4]
    options = {"bag_tables": bags, "oov": draw.choice(["zeros", "learned"])}
    if options["oov"] == "learned" and draw.random() < 0.5:
        options["init"] = "oov"
    return seed, tables, not exact, options


def alike(table: DynamicTableConfig) -> list[DynamicTableConfig]:
    """All tables with the settings of one."""
    return [replace(table, name=name, features=features) for name, features in FEATURES.items()]
