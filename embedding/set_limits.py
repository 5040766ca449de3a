"""The limits of a set's tables, and what full ones do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.embedding.cold_queues import ColdQueues
from tessera.embedding.cold_rows import ColdRows
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.errors import TableFull
from tessera.embedding.rows_of_tables import RowsOfTable


class SetLimits:
    """True if a table has a limit. queues: where look-ups on a GPU find cold rows; None: table by table, with waits."""

    def __init__(
        self, tables: Sequence[DynamicTableConfig], rows_of: Sequence[RowsOfTable], queues: ColdQueues | None
    ) -> None:
        self._tables = tables
        limits = [table.row_limit for table in tables]
        self._limits = {number: limit for number, limit in enumerate(limits) if limit is not None}
        self._cold = [
            None if table.eviction == "raise" else ColdRows(rows, table.eviction)
            for table, rows in zip(tables, rows_of, strict=True)
        ]
        evict = any(self._cold[table] is not None for table in self._limits)
        self.queues = queues if evict else None

    def __bool__(self) -> bool:
        return bool(self._limits)

    @property
    def some_without(self) -> bool:
        """Whether a table has no limit."""
        return len(self._limits) < len(self._tables)

    def may_be_full(self, bounds: Tensor, used: Sequence[int]) -> bool:
        """Return whether a batch could end in TableFull, so that nothing must be noted before. The host waits."""
        if not self._limits:
            return False
        sizes = bounds.diff().tolist()
        least = {table: 0 if self._cold[table] is not None else used[table] for table in self._limits}
        return any(least[table] + sizes[table] > limit for table, limit in self._limits.items())

    def missing(self, used: Sequence[int], wanted: Sequence[int]) -> list[int]:
        """Return how many rows of each table have to go so that so many more fit."""
        found = [0] * len(self._tables)
        for table, limit in self._limits.items():
            found[table] = max(0, used[table] + wanted[table] - limit)
        return found

    def check(
        self, missing: Sequence[int], used: Sequence[int], wanted: Sequence[int], known: Sequence[int] | None
    ) -> None:
        """Raise TableFull for the first table that cannot give up what is missing. known: rows of each table that the
        batch has, none of which may go; None: they are no more than the limit lets them be."""
        for table, rows in enumerate(missing):
            if rows and self._cold[table] is None:
                raise self._full(table, used[table], wanted[table])
            if rows and known is not None and rows > used[table] - known[table]:
                raise self._full(table, used[table], wanted[table])

    def coldest(self, table: int, missing: int, used: int, wanted: int, spare: Tensor) -> Tensor:
        """Return the coldest rows of a table, so many, none of `spare`. Raises TableFull."""
        cold = self._cold[table]
        if cold is not None and self.queues is not None:
            cold.reset()  # nobody tells it of rows
        rows = cold.take(missing, spare) if cold is not None and missing <= used else None
        if rows is None:
            raise self._full(table, used, wanted)
        return rows

    def added(self, table: int, rows: Tensor) -> None:
        """Register rows that were given to ids."""
        cold = self._cold[table]
        if cold is not None:
            cold.add(rows)

    def reset(self, table: int) -> None:
        """Forget what was learnt of a table: its rows may have become colder."""
        cold = self._cold[table]
        if cold is not None:
            cold.reset()
        if self.queues is not None:
            self.queues.reset()

    def _full(self, table: int, used: int, wanted: int) -> TableFull:
        name, limit = self._tables[table].name, self._limits[table]
        full = f"table {name}: limit of {limit:,} rows, {used:,} in use, {wanted:,} more wanted"
        if self._cold[table] is None:
            return TableFull(f"{full}; raise max_rows or max_bytes, set ttl_seconds, or choose eviction lru or lfu")
        return TableFull(f"{full} by one batch; raise max_rows or max_bytes, or make the batch smaller")
