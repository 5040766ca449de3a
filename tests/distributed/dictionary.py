"""Tables as a dictionary of rows, with autograd: what sharded tables must equal, and their training on ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.sharding import shard
from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.kernels.random import normal

SEED, LR, EPS, BATCH, STEPS, NEW_PERIOD = 3, 0.1, 1e-8, 12, 5, 3
# Adagrad from 0 divides a row's first gradient by its own size, and with it the rounding error of a sum that nearly
# cancels: then the order of sums alone moves rows by 1e-5.
FIRST_STATE = 1.0
IDS = ["a", "b", "c"]
GROUPS = (Group("v", 4, 0.5), Group("w", 1, 0.5))
WIDTH = 5


@dataclass(frozen=True)
class Case:
    """What a test varies."""

    averaged: tuple[str, ...] = ()
    weighted: bool = False
    oov: str = "zeros"
    threshold: int = 1
    transport: str = "fp32"
    longest: int = 3
    old_rows_factor: float = 1.0  # a period begins before step NEW_PERIOD
    init: str = "random"
    options: tuple[tuple[str, Any], ...] = ()  # further arguments of DynamicTables

    @property
    def tables(self) -> list[DynamicTableConfig]:
        """b and c share a table."""
        optimizer = RowOptimizer(
            "rowwise_adagrad",
            lr=LR,
            eps=EPS,
            initial_accumulator=FIRST_STATE,
            old_rows_factor=self.old_rows_factor,
        )
        kind = "none" if self.threshold == 1 else "exact"
        common = {"optimizer": optimizer, "seed": SEED, "admission": Admission(kind, self.threshold)}
        return [
            DynamicTableConfig("a", ("a",), GROUPS, **common),
            DynamicTableConfig("bc", ("b", "c"), GROUPS, **common),
        ]


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        options = {"init": case.init, **dict(case.options)}
        self.tables = DynamicTables(case.tables, IDS, 100, case.averaged, case.transport, case.oov, **options)
        self.mix = nn.Parameter(torch.randn(3 * WIDTH, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        out = self.tables(ids)
        return (torch.cat([out["v"].flatten(1), out["w"].flatten(1)], 1) * self.mix).sum(1).square()


def draw_bags(step: int, longest: int) -> list[list[list[tuple[int, float]]]]:
    """[feature][row] -> (id, weight): any 64-bit id, empty bags and repeats among them; new ids in every step."""
    generator = torch.Generator().manual_seed(step)
    pool = torch.randint(-(2**62), 2**62, (8,), generator=generator).tolist()
    pool += [0, -1, 2**63 - 1, -(2**63), *range(100, 110)]

    def number(end: int) -> int:
        return int(torch.randint(0, end, (), generator=generator))

    def bag() -> list[tuple[int, float]]:
        return [(pool[number(len(pool))], number(9) / 4 - 1) for _ in range(number(longest + 1))]

    return [[bag() for _ in range(BATCH)] for _ in IDS]


def rows_of_rank(rank: int, world: int, step: int) -> slice:
    """A step's rows of one rank: not the same number on each, in one step none at all on the last."""
    if world == 1:
        return slice(0, BATCH)
    shares = [BATCH // world] * world
    shares[0] += step % 3
    shares[-1] -= step % 3
    if step == 4:
        shares[0] += shares[-1]
        shares[-1] = 0
    first = sum(shares[:rank])
    return slice(first, first + shares[rank])


def to_kjt(bags: list[list[list[tuple[int, float]]]], weighted: bool) -> KeyedJaggedTensor:
    flat = [bag for feature in bags for bag in feature]
    return KeyedJaggedTensor(
        keys=IDS,
        values=torch.tensor([i for bag in flat for i, _ in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in flat], dtype=torch.int32),
        weights=torch.tensor([w for bag in flat for _, w in bag]) if weighted else None,
        stride=len(bags[0]),
    )


def train(process, case: Case) -> dict:
    """This rank's share of the training: its outputs by step, its rows, the learned rows, outputs on unseen ids."""
    model = Model(case)
    sharded, plan = shard(model, model.tables, process, BATCH // process.world_size)

    def output(step: int) -> Tensor:
        mine = rows_of_rank(process.rank, process.world_size, step)
        return sharded(to_kjt([feature[mine] for feature in draw_bags(step, case.longest)], case.weighted))

    outputs = []
    for step in range(STEPS):
        if step == NEW_PERIOD:
            model.tables.begin_period()
        model.tables.begin_step(now=100 + step)
        out = output(step)
        (out.sum() * process.world_size / BATCH).backward()
        outputs.append(out.detach().tolist())
        with torch.no_grad():
            for parameter in model.tables.dense_parameters().values():
                parameter -= LR * parameter.grad
                parameter.grad = None
    sharded.eval()
    rows = {
        (name, int(i)): (v.tolist(), s.tolist(), int(seen), int(count))
        for name, table in model.tables.owned().items()
        for batch in table.export_rows()
        for i, v, s, seen, count in zip(batch.ids, batch.values, batch.state, batch.last_seen, batch.count, strict=True)
    }
    with torch.no_grad():
        unseen = [output(step).tolist() for step in (99, 100)]
    oov = None if model.tables.oov is None else model.tables.oov.tolist()
    return {"outputs": outputs, "rows": rows, "oov": oov, "unseen": unseen, "plan": plan}


class Reference:
    """The same training on one rank with a dictionary: (table, id) -> row."""

    def __init__(self, case: Case) -> None:
        self.case, self.mix = case, Model(case).mix.detach()
        self.oov = torch.zeros(2, WIDTH, requires_grad=True)
        self.rows: dict[tuple[str, int], Tensor] = {}
        self.state, self.seen, self.count, self.waiting, self.added = {}, {}, {}, {}, {}

    def train(self) -> dict:
        outputs = []
        for step in range(STEPS):
            self._admit(step)
            leaves = {key: row.clone().requires_grad_() for key, row in self.rows.items()}
            out = self._forward(step, leaves)
            (out.sum() / BATCH).backward()
            outputs.append(out.detach().tolist())
            for key, leaf in leaves.items():
                if self.seen[key] == 100 + step:
                    old = self.added[key] < NEW_PERIOD <= step
                    self._update(key, leaf.grad, LR * self.case.old_rows_factor if old else LR)
            if self.oov.grad is not None:
                with torch.no_grad():
                    self.oov -= LR * self.oov.grad
                self.oov.grad = None
        with torch.no_grad():
            unseen = [self._forward(step, self.rows).tolist() for step in (99, 100)]
        rows = {key: (row.tolist(), self.state[key].tolist(), self.seen[key], self.count[key])
                for key, row in self.rows.items()}  # fmt: skip
        return {"outputs": outputs, "rows": rows, "oov": self.oov.tolist(), "unseen": unseen}

    def _admit(self, step: int) -> None:
        found: dict[tuple[str, int], int] = {}
        for feature, bags in zip(IDS, draw_bags(step, self.case.longest), strict=True):
            for i, _ in (item for bag in bags for item in bag):
                key = ("a" if feature == "a" else "bc", i)
                found[key] = found.get(key, 0) + 1
        for key, times in found.items():
            if key not in self.rows:
                self.waiting[key] = self.waiting.get(key, 0) + times
                if self.waiting[key] < self.case.threshold:
                    continue
                table = self.case.tables[int(key[0] == "bc")]
                ids = torch.tensor([key[1]])
                parts = [normal(SEED, table.key(g), ids, g.dim)[0] * g.init_std for g in GROUPS]
                oov = self.oov[int(key[0] == "bc")].detach().clone()
                self.rows[key] = oov if self.case.init == "oov" else torch.cat(parts)
                self.state[key], self.count[key], self.added[key] = torch.full((2,), FIRST_STATE), 0, step
            self.count[key] += times
            self.seen[key] = 100 + step

    def _forward(self, step: int, rows: dict[tuple[str, int], Tensor]) -> Tensor:
        parts = []
        for feature, bags in zip(IDS, draw_bags(step, self.case.longest), strict=True):
            table = "a" if feature == "a" else "bc"
            for bag in bags:
                total = torch.zeros(WIDTH)
                for i, weight in bag:
                    other = self.oov[int(table == "bc")] if self.case.oov == "learned" else torch.zeros(WIDTH)
                    total = total + rows.get((table, i), other) * (weight if self.case.weighted else 1.0)
                parts.append(total / max(1, len(bag)) if feature in self.case.averaged else total)
        x = torch.stack(parts).view(3, BATCH, WIDTH).transpose(0, 1)
        flat = torch.cat([x[..., :4].flatten(1), x[..., 4:].flatten(1)], 1)
        return (flat * self.mix).sum(1).square()

    def _update(self, key: tuple[str, int], grad: Tensor, lr: float) -> None:
        for number, columns in enumerate((slice(0, 4), slice(4, 5))):
            self.state[key][number] += grad[columns].square().mean()
            self.rows[key][columns] -= lr * grad[columns] / (self.state[key][number].sqrt() + EPS)


def joined(results: list[dict]) -> dict:
    """What `train` gave on each rank, as one."""
    rows = {key: row for result in results for key, row in result["rows"].items()}
    assert len(rows) == sum(len(result["rows"]) for result in results)  # each id on one rank
    for result in results:
        assert result["oov"] == results[0]["oov"]
    return {
        "outputs": [
            [v for result in results for v in result["outputs"][step]] for step in range(len(results[0]["outputs"]))
        ],
        "unseen": [[v for result in results for v in result["unseen"][step]] for step in range(2)],
        "rows": rows,
        "oov": results[0]["oov"],
    }


def same(found: dict, expected: dict, rel: float = 1e-5, absolute: float = 1e-5) -> None:
    for outputs, expected_outputs in zip(found["outputs"], expected["outputs"], strict=True):
        assert outputs == pytest.approx(expected_outputs, rel=rel, abs=absolute)
    for step in range(2):
        assert found["unseen"][step] == pytest.approx(expected["unseen"][step], rel=rel, abs=absolute)
    assert found["rows"].keys() == expected["rows"].keys()
    for key, (values, state, seen, count) in expected["rows"].items():
        assert found["rows"][key][0] == pytest.approx(values, rel=rel, abs=absolute)
        assert found["rows"][key][1] == pytest.approx(state, rel=rel, abs=absolute)
        assert found["rows"][key][2:] == (seen, count)
    if found["oov"] is not None:
        for row, expected_row in zip(found["oov"], expected["oov"], strict=True):
            assert row == pytest.approx(expected_row, rel=rel, abs=absolute)
