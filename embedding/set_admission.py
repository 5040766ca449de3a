"""The admission filters of a set's tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tessera.embedding.admission import ExactCounter, ProbabilisticFilter, admission_filter
from tessera.embedding.config import DynamicTableConfig, key_of
from tessera.embedding.sliding import SlidingHashFilter

Filter = ExactCounter | SlidingHashFilter | ProbabilisticFilter


class SetAdmission:
    """filters: of each table, None where every id passes."""

    def __init__(self, tables: Sequence[DynamicTableConfig], device: torch.device) -> None:
        self.filters: list[Filter | None] = [
            admission_filter(table.admission, table.seed, key_of(table.name), table.ttl_seconds, device)
            for table in tables
        ]
        self.admits_all = not any(one is not None for one in self.filters)

    def admit(
        self, ids: Tensor, of_tables: Sequence[int], counts: Tensor | None, now: int | Tensor, step: int
    ) -> Tensor | None:
        """Return which unknown ids get a row, bool [k]; None if all do.

        ids: int64 [k], of_tables[t] of table t, one behind the other; counts: int64 [k]
        (None: 1 each); now: one time or int64 [k].
        """
        if self.admits_all:
            return None
        passed = torch.ones(ids.numel(), dtype=torch.bool, device=ids.device)
        often = torch.ones_like(ids) if counts is None else counts
        for one, (begin, end) in zip(self.filters, pairwise([0, *accumulate(of_tables)]), strict=True):
            if one is not None and begin < end:
                times = now[begin:end] if isinstance(now, Tensor) and now.numel() > 1 else now
                passed[begin:end] = one.admit(ids[begin:end], often[begin:end], times, step)
        return passed
