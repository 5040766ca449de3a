"""Count the rows that the tables of a run hold, gain and lose in a day."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tessera.distributed.collectives import sum_over_ranks
from tessera.distributed.tables import DynamicTablesProtocol


@dataclass(frozen=True)
class TableCounts:
    """Counts of all tables together; None if the tables do not count, as static ones.

    Attributes:
        rows, bytes: that they hold.
        new, expired: rows added, and expired or evicted.
    """

    rows: int | None = None
    bytes: int | None = None
    new: int | None = None
    expired: int | None = None

    def since(self, before: TableCounts) -> TableCounts:
        """Return the same with only the rows added and lost since then."""
        if self.rows is None:
            return self
        assert self.new is not None and self.expired is not None  # all counts are there, or none is
        assert before.new is not None and before.expired is not None
        return replace(self, new=self.new - before.new, expired=self.expired - before.expired)


def count_tables(tables: DynamicTablesProtocol | None) -> TableCounts:
    """Return counts over all ranks, since there are tables. Collective."""
    if tables is None:
        return TableCounts()
    stats = tables.stats().values()
    names = ("rows", "bytes", "admitted", "expired", "evicted")
    counts = torch.tensor([sum(int(one[name]) for one in stats) for name in names])
    sum_over_ranks(counts)
    rows, held, new, expired, evicted = counts.tolist()
    return TableCounts(rows, held, new, expired + evicted)
