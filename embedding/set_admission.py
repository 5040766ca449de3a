"""The admission filters of a set's tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tessera.embedding.admission import ProbabilisticFilter, VocabularyFilter, admits_by_chance, slides
from tessera.embedding.config import DynamicTableConfig, key_of
from tessera.embedding.exact_counters import ExactCounterOfTable, ExactCounters
from tessera.embedding.sliding import SlidingFilterOfTable, SlidingFilters
from tessera.kernels.random import half_stream, uniform_of_tables

Filter = ExactCounterOfTable | SlidingFilterOfTable | ProbabilisticFilter | VocabularyFilter


class SetAdmission:
    """filters: of each table, None where every id passes."""

    def __init__(self, tables: Sequence[DynamicTableConfig], device: torch.device) -> None:
        rules = [table.admission for table in tables]
        exact = [rule.threshold if rule.kind == "exact" and rule.threshold > 1 else None for rule in rules]
        self._exact: ExactCounters | None = None
        self._sliding: SlidingFilters | None = None
        self.filters: list[Filter | None] = [
            ProbabilisticFilter(rule.threshold, table.seed, key_of(table.name)) if admits_by_chance(rule) else None
            for table, rule in zip(tables, rules, strict=True)
        ]
        if any(exact):
            self._exact = ExactCounters(exact, [table.ttl_seconds for table in tables], device)
            self.filters = [counter or one for counter, one in zip(self._exact.filters, self.filters, strict=True)]
        rings = [(rule.threshold, rule.capacity, rule.splits) if slides(rule) else None for rule in rules]
        if any(rings):
            self._sliding = SlidingFilters(rings, device)
            for table, ring in enumerate(rings):
                self.filters[table] = (
                    self.filters[table] if ring is None else SlidingFilterOfTable(self._sliding, table)
                )
        self._vocabularies: list[tuple[int, VocabularyFilter]] = []
        for table, rule in enumerate(rules):
            if rule.kind == "vocabulary":
                self.filters[table] = one = VocabularyFilter(device)
                self._vocabularies.append((table, one))
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
        one time or int64 [k]. All tables that admit by the same kind of rule take one call together, but each of those
        with a vocabulary one of its own.
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
        if self._sliding is not None:
            passed &= self._sliding.admit(ids, tables, of_tables, often)
        ends = [0, *accumulate(of_tables)] if self._vocabularies else []
        for table, vocabulary in self._vocabularies:
            own = slice(ends[table], ends[table + 1])
            if of_tables[table]:
                passed[own] = vocabulary.admit(ids[own], often[own], now, step)
        return passed
