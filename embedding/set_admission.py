"""The admission filters of a set's tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tessera.embedding.admission import ProbabilisticFilter, other_filter
from tessera.embedding.config import DynamicTableConfig, key_of
from tessera.embedding.exact_counters import ExactCounterOfTable, ExactCounters
from tessera.embedding.sliding import SlidingHashFilter
from tessera.kernels.random import half_stream, uniform_of_tables

Filter = ExactCounterOfTable | SlidingHashFilter | ProbabilisticFilter


class SetAdmission:
    """filters: of each table, None where every id passes."""

    def __init__(self, tables: Sequence[DynamicTableConfig], device: torch.device) -> None:
        rules = [table.admission for table in tables]
        exact = [rule.threshold if rule.kind == "exact" and rule.threshold > 1 else None for rule in rules]
        self._exact: ExactCounters | None = None
        counters: list[ExactCounterOfTable | None] = [None] * len(tables)
        if any(exact):
            self._exact = ExactCounters(exact, [table.ttl_seconds for table in tables], device)
            counters = self._exact.filters
        self.filters: list[Filter | None] = [
            counter or other_filter(table.admission, table.seed, key_of(table.name), device)
            for table, counter in zip(tables, counters, strict=True)
        ]
        self._sliding = [table for table, one in enumerate(self.filters) if isinstance(one, SlidingHashFilter)]
        self.admits_all = not any(one is not None for one in self.filters)
        chances = [one for one in self.filters if isinstance(one, ProbabilisticFilter)]
        self._halves: Tensor | None = None
        if chances:
            missed = [one.miss if isinstance(one, ProbabilisticFilter) else 0.0 for one in self.filters]
            halves = [half_stream(table.seed, key_of(table.name)) for table in tables]
            self._missed = torch.tensor(missed, dtype=torch.float64, device=device)
            self._halves = torch.tensor(halves, device=device)

    def admit(
        self,
        ids: Tensor,
        tables: Tensor,
        of_tables: Sequence[int],
        counts: Tensor | None,
        now: int | Tensor,
        step: int,
    ) -> Tensor | None:
        """Return which unknown ids get a row, bool [k]; None if all do.

        ids, tables: int64 [k], of_tables[t] of table t, one behind the other; counts: int64 [k] (None: 1 each); now:
        one time or int64 [k]. Tables that admit by chance take one call together, so do those that count exactly.
        """
        if self.admits_all:
            return None
        often = torch.ones_like(ids) if counts is None else counts
        if self._halves is None:
            passed = torch.ones(ids.numel(), dtype=torch.bool, device=ids.device)
        else:
            # step + 1: at step 0 the same numbers make the initial values of a row.
            lots = uniform_of_tables(self._halves, tables, ids, step + 1)
            passed = lots < 1 - self._missed[tables] ** often.to(torch.float64)
        if self._exact is not None:
            passed &= self._exact.admit(ids, tables, of_tables, often, now)
        ends = [0, *accumulate(of_tables)] if self._sliding else []
        for table in self._sliding:
            own, one = slice(ends[table], ends[table + 1]), self.filters[table]
            assert isinstance(one, SlidingHashFilter)
            if of_tables[table]:
                passed[own] = one.admit(ids[own], often[own], now, step)
        return passed
