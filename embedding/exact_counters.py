"""The exact admission filters of all tables of a set as one: one id map, one store, one call whatever their number.

What is kept of an id that has no row yet is a record without values (`kernels/record_layout.py`): its time, count, id
and table. A table's records have the places that they would have alone, so it forgets and saves the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tessera.embedding.record_store import RecordStore
from tessera.embedding.row_index import ID
from tessera.embedding.rows_of_tables import RowsOfTable, RowsOfTables
from tessera.kernels import records
from tessera.kernels.host_numbers import on_device
from tessera.kernels.id_map import IdMap
from tessera.kernels.record_layout import COUNT, LAST_SEEN

_WALK_ROWS = 1 << 16  # read in one piece when the state is saved


class ExactCounters:
    """thresholds: of each table of the set, None for a table without an exact filter; ttls: seconds after which its
    pending ids are forgotten, None: never. filters: that of each table by itself, or None."""

    def __init__(
        self, thresholds: Sequence[int | None], ttls: Sequence[int | None], device: torch.device | str
    ) -> None:
        self.store = RecordStore(None, device)
        self.map = IdMap(device)
        self.rows = RowsOfTables(len(thresholds), self.store)
        self.filters = [
            None if threshold is None else ExactCounterOfTable(self, table, ttl)
            for table, (threshold, ttl) in enumerate(zip(thresholds, ttls, strict=True))
        ]
        self._thresholds = torch.tensor([threshold or 0 for threshold in thresholds], device=device)

    def admit(self, ids: Tensor, tables: Tensor, of_tables: Sequence[int], counts: Tensor, now: int | Tensor) -> Tensor:
        """Return which unknown ids pass, bool [k]: those that have been seen as often as their table's threshold, this
        batch included, and all of tables without a filter. Ids that pass are forgotten.

        ids, tables: int64 [k], distinct, of_tables[t] of table t, one behind the other; counts: int64 [k]; now: one
        time or int64 [k].
        """
        layout = self.store.layout
        bounds = on_device([0, *accumulate(of_tables)], ids.device)
        rows = records.find(self.map, self.store.chunks, ids, bounds, layout, now, counts)
        known = rows >= 0
        total = records.read(self.store.chunks, rows, layout, layout.meta_at + 8 * COUNT, 8).view(torch.int64).flatten()
        passed = torch.where(known, total, counts) >= self._thresholds[tables]
        new, gone = (~passed & ~known).nonzero().flatten(), (passed & known).nonzero().flatten()
        if new.numel():
            times = now[new] if isinstance(now, Tensor) and now.numel() > 1 else now
            self.add(ids[new], tables[new], times, counts[new])
        if gone.numel():
            self.forget(rows[gone], ids[gone], tables[gone])
        return passed

    def add(self, ids: Tensor, tables: Tensor, times: int | Tensor, counts: Tensor) -> None:
        """Begin to count unknown ids (int64 [k], distinct) of tables (int64 [k], ascending)."""
        rows = self.rows.take(tables, self._of_tables(tables), limited=False)
        self.map.insert(ids, rows, tables)
        seen = torch.full_like(ids, times) if isinstance(times, int) else times.expand(ids.numel())
        words = torch.stack([seen, counts, ids, tables], 1)
        layout = self.store.layout
        records.write(self.store.chunks, rows, words.view(torch.uint8), layout, layout.meta_at)

    def forget(self, rows: Tensor, ids: Tensor, tables: Tensor) -> None:
        """Forget ids (int64 [k]) that have these rows, of tables (int64 [k], ascending)."""
        self.map.erase(ids, tables)
        self.store.clear(rows)
        self.rows.free.give_back_all(rows, tables, self._of_tables(tables))

    def _of_tables(self, tables: Tensor) -> list[int]:
        found: list[int] = torch.bincount(tables, minlength=len(self.filters)).tolist()
        return found


class ExactCounterOfTable:
    """The exact filter of one table of a set: what is saved of it, and what it forgets."""

    def __init__(self, counters: ExactCounters, table: int, ttl_seconds: int | None) -> None:
        self._counters, self._table, self._ttl_seconds = counters, table, ttl_seconds
        self._rows = RowsOfTable(counters.rows, counters.store, table)

    @property
    def nbytes(self) -> int:
        """Bytes in use, with the table's share of the id map."""
        ends = [end + 1 for end in self._counters.rows.ends]
        share = self._counters.map.nbytes * ends[self._table] // sum(ends)
        return self._rows.end * self._counters.store.layout.bytes + self._rows.free.nbytes + share

    def expire(self, now: int, budget_rows: int | None = None) -> None:
        """Drop ids not seen for the TTL; looks at `budget_rows` of them (None: at all)."""
        if self._ttl_seconds is not None:
            for rows in self._rows.expired(now, self._ttl_seconds, budget_rows):
                if rows.numel():
                    self._counters.forget(rows, self._counters.store.ids_of(rows), torch.full_like(rows, self._table))

    def export_state(self) -> dict[str, Tensor]:
        """Return ids, counts, last_seen: int64 [k]. May be cut by id, as rows may."""
        parts = [torch.empty((0, 4), dtype=torch.int64)] + [meta for _, meta in self._rows.walk(_WALK_ROWS)]
        meta = torch.cat([part.to(parts[-1].device) for part in parts])
        names = {"ids": ID, "counts": COUNT, "last_seen": LAST_SEEN}
        return {name: meta[:, column].contiguous() for name, column in names.items()}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Add what another counter knew of ids that this one does not know."""
        device = self._rows.device
        ids, counts, seen = (state[name].to(device) for name in ("ids", "counts", "last_seen"))
        if ids.numel():
            self._counters.add(ids, torch.full_like(ids, self._table), seen, counts)
