"""The whole life of rows against a plain dict, by random sequences of calls."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.errors import TableFull
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.table import DynamicTable
from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.unique import unique_inverse
from tests.embedding.conftest import MARKS, both_kinds
from tests.embedding.model import Full, ModelTable

pytestmark = [both_kinds, pytest.mark.usefixtures("of_table")]

POOL = [0, 1, -1, 2**63 - 1, -(2**63), *range(1000, 1012), -7, -1000]
GROUPS = (Group("v", 3, 0.5), Group("w", 1, 0.0))
some_ids = st.lists(st.sampled_from(POOL), max_size=10)


def config_of(eviction, threshold, limit):
    return DynamicTableConfig(
        name="user",
        features=("u",),
        groups=GROUPS,
        optimizer=RowOptimizer("adagrad", lr=0.1, initial_accumulator=0.01),
        seed=7,
        admission=Admission("exact", threshold) if threshold > 1 else Admission(),
        ttl_seconds=50,
        max_rows=limit,
        eviction=eviction,
        chunk_rows=4,
    )


class Life(RuleBasedStateMachine):
    @initialize(
        eviction=st.sampled_from(["lru", "lfu", "raise"]),
        threshold=st.sampled_from([1, 1, 2, 3]),
        limit=st.sampled_from([None, 1, 6, 11]),
    )
    def begin(self, eviction, threshold, limit):
        self.config = config_of(eviction, threshold, limit)
        self.table, self.model = DynamicTable(self.config), ModelTable(self.config)
        self.table.take_evicted()  # from now on they are noted
        self.now, self.marks = 1000, []

    @rule(ids=some_ids, seconds=st.integers(0, 9), seed=st.integers(0, 99))
    def train(self, ids, seconds, seed):
        self.now += seconds
        self._train(ids, self.now, seed)

    @rule(ids=some_ids, late=st.integers(1, 30))
    def train_on_late_rows(self, ids, late):
        self._train(ids, self.now - late, late)

    def _train(self, ids, now, seed):
        unique, inverse, counts = unique_inverse(torch.tensor(ids, dtype=torch.int64))
        try:
            expected = self.model.lookup(unique.tolist(), now, counts.tolist())
        except Full:
            with pytest.raises(TableFull, match="table user: limit of"):
                self.table.lookup(unique, now, counts)
            return
        rows = self.table.lookup(unique, now, counts)
        assert rows.tolist() == [-1 if row is None else row for row in expected]
        width = self.config.width
        values = self.table.gather(rows, inverse)
        zeros = np.zeros(width, np.float32)
        for i, value in zip(ids, values.numpy(), strict=True):
            np.testing.assert_allclose(value, self.model.rows[i].values if i in self.model.rows else zeros, 1e-5, 1e-6)
        grads = torch.randn((len(ids), width), generator=torch.Generator().manual_seed(seed))
        self.table.update(rows, grads, inverse)
        merged = torch.zeros((len(unique), width)).index_add_(0, inverse, grads)
        self.model.update(unique.tolist(), list(merged.numpy()))

    @rule(ids=some_ids)
    def evaluate(self, ids):
        rows = self.table.lookup(torch.tensor(ids, dtype=torch.int64), 10**9, training=False)
        known = self.model.rows
        assert rows.tolist() == [known[i].number if i in known else -1 for i in ids]

    @rule(seconds=st.integers(0, 60), budget=st.sampled_from([None, 0, 1, 3, 100]))
    def expire(self, seconds, budget):
        self.now += seconds
        if budget is not None and self.config.admission.kind == "exact":
            budget = None  # the model does not know in which order pending ids are looked at
        assert self.table.expire(self.now, budget) == self.model.expire(self.now, budget)

    @rule()
    def take_evicted(self):
        assert sorted(self.table.take_evicted().tolist()) == sorted(self.model.take_evicted())

    @rule()
    def mark(self):
        self.marks.append(self.table.mark())
        self.model.mark += 1
        assert self.marks[-1] == self.model.mark

    @rule(ids=st.lists(st.sampled_from(POOL), max_size=4, unique=True), age=st.integers(0, 60), count=st.integers(1, 5))
    def take_in(self, ids, age, count):
        """Rows from elsewhere: of unknown ids, or instead of those of known ids, which may get older by it."""
        k, last_seen = len(ids), self.now - age
        values, state = torch.full((k, 4), 0.5), torch.rand((k, 4), generator=torch.Generator().manual_seed(age))
        columns = (
            torch.tensor(ids, dtype=torch.int64),
            values,
            state,
            torch.full((k,), last_seen),
            torch.full((k,), count),
        )
        try:
            self.model.make_room(sum(i not in self.model.rows for i in ids), keep=ids)
        except Full:
            with pytest.raises(TableFull):
                self.table.import_rows(RowBatch(*columns))
            return
        self.table.import_rows(RowBatch(*columns))
        for i, value, more in zip(ids, values.numpy(), state.numpy(), strict=True):
            row = self.model.rows.get(i) or self.model.add(i, None, None)
            row.values, row.state, row.last_seen, row.count, row.mark = value, more, last_seen, count, self.model.mark

    @invariant()
    def same_touched_rows(self):
        for mark in self.marks[-2:] if hasattr(self, "marks") else []:
            found = [i for ids in self.table.touched_since(mark, 3) for i in ids.tolist()]
            assert sorted(found) == sorted(i for i, row in self.model.rows.items() if row.mark >= mark)

    @rule(numbered=st.booleans(), batch_rows=st.sampled_from([1, 3, 1000]))
    def move(self, numbered, batch_rows):
        """Go on with a new table made from what this one exports."""
        self.take_evicted()
        moved, state = DynamicTable(self.config), self.table.export_state()
        moved.take_evicted()
        if not numbered:
            state = {name: value for name, value in state.items() if not name.startswith("rows/")}
            self.model.renumber()
        moved.import_state(state)
        for batch in self.table.export_rows(batch_rows):
            assert 0 < batch.ids.numel() <= batch_rows
            batch.rows = batch.rows if numbered else None
            moved.import_rows(batch)
        self.table, self.marks, self.model.mark = moved, [], 0
        for row in self.model.rows.values():
            row.mark = 0

    @invariant()
    def same_rows(self):
        if not hasattr(self, "table"):
            return
        stats = self.table.stats()
        assert len(self.table) == len(self.model.rows) == stats["rows"]
        assert {name: stats[name] for name in self.model.total} == self.model.total
        found = {}
        for batch in self.table.export_rows(5):
            columns = batch.ids, batch.rows, batch.last_seen, batch.count
            for *facts, values, state in zip(*(c.tolist() for c in columns), batch.values, batch.state, strict=True):
                found[facts[0]] = facts[1:], torch.cat([values, state]).numpy()
        assert found.keys() == self.model.rows.keys()
        for i, row in self.model.rows.items():
            facts, content = found[i]
            assert facts == [row.number, row.last_seen, row.count], i
            # The state of each group lies behind that of the group before it, as the values do.
            np.testing.assert_allclose(content, np.concatenate([row.values, row.state]), 1e-5, 1e-6)


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in available_backends()])
@pytest.mark.parametrize("lives", [10, pytest.param(75, marks=pytest.mark.slow)])
def test_life_of_rows(name, lives):
    examples = lives if name == "cpp" else max(5, lives // 3)
    limits = settings(
        max_examples=examples, stateful_step_count=40, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    with use_backend(name):
        run_state_machine_as_test(Life, settings=limits)
