"""All tables of one layout on one rank as one: one id map, one store of records, one call for all of them.

What `DynamicTable` does for one table this does for any number, in as many operations. It shall take its place; still
missing are admission, eviction at a limit, snapshots, learned scales, the cache, and saved states (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tessera.embedding.config import DynamicTableConfig, key_of
from tessera.embedding.errors import ConfigError, TableFull
from tessera.embedding.free_rows import FreeRows
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.row_store import RowStore
from tessera.embedding.table import COUNTERS
from tessera.kernels import records
from tessera.kernels.chunks import allocate_chunk
from tessera.kernels.id_map import IdMap
from tessera.kernels.layout import plain_layout
from tessera.kernels.record_layout import (
    COUNT,
    ID,
    LAST_SEEN,
    META_BYTES,
    TABLE,
    RecordLayout,
    is_plain,
    record_layout,
)
from tessera.kernels.records import FirstValues, Keys, Positions, Unknown, keys_of

UNLIMITED = torch.iinfo(torch.int64).max
_TABLE_BITS = (1 << 32) - 1
_SCAN_ROWS = 1 << 18  # records read in one piece, which bounds the temporary memory of a walk


class TableSet:
    """Tables that have the same groups, but for the first values' spread, the same optimizer, but for its learning
    rate, and the same seed. Each has its own limit and TTL.

    Ids are flat: those of table t (its place in `tables`) are at bounds[t] to bounds[t + 1] - 1, bounds int64 [T + 1].
    All tensors that go in and out live on `device`. Row numbers are those of all tables together, and good until rows
    are removed.

    Attributes:
        tables: the configs, in order. layout: of a record.
        rows_of: rows in use, int64 [T]. counters: what happened since the beginning, int64 [len(COUNTERS), T].
        limits: most rows, int64 [T], UNLIMITED where there is none. ttls: seconds, int64 [T], likewise.
        rates: learning rates, float64 [T].

    Raises ConfigError, one line, for tables that are not alike.
    """

    def __init__(self, tables: Sequence[DynamicTableConfig], device: torch.device | str = "cpu") -> None:
        self.tables = tuple(tables)
        self.device = torch.device(device)
        _check(self.tables)
        first = self.tables[0]
        self.layout = _layout(first)
        self.map = IdMap(device)
        self.rows_of = torch.zeros(len(tables), dtype=torch.int64, device=device)
        self.counters = torch.zeros((len(COUNTERS), len(tables)), dtype=torch.int64, device=device)
        self.limits = self._of_tables([table.row_limit for table in self.tables])
        self.ttls = self._of_tables([table.ttl_seconds for table in self.tables])
        self.rates = torch.tensor([table.optimizer.lr for table in tables], dtype=torch.float64, device=device)
        self._limited = any(table.row_limit is not None for table in self.tables)
        self._optimizer = first.optimizer
        self._keys = _keys(self.tables, device)
        scales = tuple(group.scale for group in first.groups)
        self._first = FirstValues(self._optimizer.initial_accumulator, scales)
        self._codec = RowStore(first, device)  # holds no rows: it knows what a group's bytes mean
        self._chunks: list[Tensor] = []
        self._reserved = 0
        self._end = 0  # all rows ever taken are below
        self._free = FreeRows(device)
        self._step = 0

    def _of_tables(self, numbers: Sequence[int | None]) -> Tensor:
        known = [UNLIMITED if number is None else number for number in numbers]
        return torch.tensor(known, dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        """Return the number of rows in use, of all tables."""
        return len(self.map)

    @property
    def width(self) -> int:
        """Floats of one row that a look-up returns: those of all groups."""
        return self.layout.width

    @property
    def nbytes(self) -> int:
        """Bytes in use; what is reserved beyond has not been touched on a CPU."""
        return self.map.nbytes + self._end * self.layout.bytes + self._free.nbytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of records that are reserved, in use or not."""
        return self._reserved * self.layout.bytes

    def find(self, ids: Tensor, bounds: Tensor) -> Tensor:
        """Return the rows of ids: int64 [n], -1 for an id that has none. Nothing changes."""
        return records.find(self.map, self._chunks, ids, bounds, self.layout)

    def lookup(self, ids: Tensor, bounds: Tensor, now: int | Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the rows of a batch's ids in training: int64 [u]; an unknown id gets one. All rows are touched.

        ids: int64 [u], distinct within a table; now: seconds, one number or int64 [u]; counts: int64 [u], how often
        each id is in the batch, 1 or more (None: once). Call it on every step, without ids too.

        Raises TableFull if a table would have more rows than its limit.
        """
        rows, unknown = records.find_unknown(self.map, self._chunks, ids, bounds, self.layout, now, counts)
        self._step += 1
        if unknown is not None:
            rows[unknown.positions] = self._add(unknown, ids, now, counts)
        return rows

    def _add(self, unknown: Unknown, ids: Tensor, now: int | Tensor, counts: Tensor | None) -> Tensor:
        """Add rows for the ids of a batch that have none; return them: int64 [k]."""
        fresh, tables, of_table = ids[unknown.positions], unknown.tables, unknown.counted
        self._check_limits(of_table)
        often = None if counts is None else counts[unknown.positions]
        if often is not None and often.device.type == "cpu" and int(often.min()) < 1:
            raise ValueError("counts must be 1 or more")
        times = now[unknown.positions] if isinstance(now, Tensor) and now.numel() > 1 else now
        rows = self._take_rows(fresh.numel())
        if unknown.segments is None:
            self.map.insert(fresh, rows, tables)
        else:
            self.map.place(fresh, rows, tables, unknown.segments)
        records.add(self._chunks, rows, fresh, tables, self.layout, self._keys, self._first, times, often)
        self.rows_of += of_table
        for counter in ("new", "admitted"):
            self.counters[COUNTERS.index(counter)].add_(of_table)
        return rows

    def _check_limits(self, wanted: Tensor) -> None:
        if not self._limited:
            return
        over = (self.rows_of + wanted > self.limits).nonzero().flatten()
        if over.numel():
            table = int(over[0])
            raise TableFull(
                f"table {self.tables[table].name}: limit of {int(self.limits[table]):,} rows, "
                f"{int(self.rows_of[table]):,} in use, {int(wanted[table]):,} more wanted; raise max_rows or "
                "max_bytes, or set ttl_seconds"
            )

    def _take_rows(self, wanted: int) -> Tensor:
        self._grow_to(self._end + max(0, wanted - len(self._free)))  # where memory ends, nothing has changed yet
        rows = self._free.take(wanted)
        if rows.numel() < wanted:
            begin, self._end = self._end, self._end + wanted - rows.numel()
            rows = torch.cat([rows, torch.arange(begin, self._end, device=self.device)])
        return rows

    def _grow_to(self, end: int) -> None:
        while self._reserved < end:
            rows = records.chunk_rows(self._reserved)
            self._chunks.append(allocate_chunk((rows, self.layout.bytes), torch.uint8, self.device))
            self._reserved += rows

    def gather(self, rows: Tensor, inverse: Tensor | None = None) -> Tensor:
        """Return values of rows, all groups side by side: float32 [u, width], or [n, width] with inverse int64 [n].

        Row -1 gives zeros.
        """
        return records.gather(self._chunks, rows, self.layout, inverse)

    def update(
        self,
        rows: Tensor,
        grads: Tensor,
        positions: Positions | None = None,
        rates: Tensor | None = None,
        mark: int = 0,
    ) -> None:
        """Apply one optimizer step to the rows of a batch, after their `lookup`.

        rows: int64 [u], distinct but for -1, which is skipped; grads: float32 [n, width], where n == u, or
        positions says which of them belong to each row (they are summed in order); rates: float64 [T],
        learning rates instead of `rates`; mark: noted in the rows if above 0.
        """
        settings, rates = self._optimizer.settings(self._optimizer.lr), self.rates if rates is None else rates
        records.update(self._chunks, rows, grads, self.layout, settings, rates, self._keys, self._step, positions, mark)

    def expire(self, now: int) -> int:
        """Remove rows with now - last seen >= the ttl of their table. Returns how many."""
        removed = 0
        for rows, meta in self._walk():
            ttls = self.ttls[meta[:, TABLE]]
            old = (ttls < UNLIMITED) & (now - meta[:, LAST_SEEN] >= ttls)
            if bool(old.any()):
                removed += self._remove(rows[old], meta[old], "expired")
        return removed

    def _remove(self, rows: Tensor, meta: Tensor, counter: str) -> int:
        """Free rows in use, of which `meta` is time, count, id and table."""
        self.map.erase(meta[:, ID].contiguous(), meta[:, TABLE].contiguous())
        for chunk, begin, inside in self._by_chunk(rows):
            chunk[rows[inside] - begin] = 0
        self._free.give_back(rows)
        of_table = torch.bincount(meta[:, TABLE], minlength=len(self.tables))
        self.rows_of -= of_table
        self.counters[COUNTERS.index(counter)] += of_table
        return rows.numel()

    def export_rows(self, table: int) -> Iterator[RowBatch]:
        """Yield the rows of one table in order of their numbers. The set must not change meanwhile."""
        for rows, meta in self._walk():
            own = meta[:, TABLE] == table
            if bool(own.any()):
                yield self._read(rows[own], meta[own])

    def _read(self, rows: Tensor, meta: Tensor) -> RowBatch:
        block = torch.empty((rows.numel(), self.layout.bytes), dtype=torch.uint8, device=self.device)
        for chunk, begin, inside in self._by_chunk(rows):
            block[inside] = chunk[rows[inside] - begin]
        values, state, scales = self._codec.decode(_groups_of(block, self.layout))
        columns = (meta[:, column].contiguous() for column in (ID, LAST_SEEN, COUNT))
        ids, last_seen, count = columns
        return RowBatch(ids=ids, values=values, state=state, last_seen=last_seen, count=count, rows=rows, scale=scales)

    def _walk(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows int64 [k], time, count, id and table int64 [k, 4]) of rows in use, ascending."""
        begin = 0
        for chunk in self._chunks:
            words = chunk.view(torch.int64)[: max(0, self._end - begin)]
            at = self.layout.meta_at // 8
            for first, part in zip(range(0, len(words), _SCAN_ROWS), words.split(_SCAN_ROWS), strict=True):
                inside = (part[:, at + COUNT] > 0).nonzero().flatten()
                meta = part[inside, at : at + META_BYTES // 8]
                meta[:, TABLE] &= _TABLE_BITS
                yield inside + (begin + first), meta
            begin += len(chunk)

    def _by_chunk(self, rows: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Yield (chunk, its first row, positions of the rows in it) for every chunk that has some."""
        begin = 0
        for chunk in self._chunks:
            inside = ((rows >= begin) & (rows < begin + len(chunk))).nonzero().flatten()
            if inside.numel():
                yield chunk, begin, inside
            begin += len(chunk)


def _layout(config: DynamicTableConfig) -> RecordLayout:
    packed = [(group, config.layout(group)) for group in config.groups]
    return record_layout([at or plain_layout(group.dim, config.optimizer.name) for group, at in packed])


def _keys(tables: Sequence[DynamicTableConfig], device: torch.device | str) -> Keys:
    of_tables = [
        [(table.key(group), key_of(f"{table.name}_{group.name}/rounding"), group.init_std) for group in table.groups]
        for table in tables
    ]
    return keys_of(tables[0].seed, of_tables, device)


def _groups_of(block: Tensor, layout: RecordLayout) -> list[Tensor]:
    """Return what the store of each group would hold, from records uint8 [n, bytes]."""
    found = []
    for group, begin in zip(layout.groups, layout.begins, strict=True):
        if not is_plain(group):
            found.append(block[:, begin : begin + group.bytes])
            continue
        values = block[:, group.values_at : group.values_at + 4 * group.dim]
        state = block[:, group.state_at : group.state_at + 4 * group.state_floats]
        both = torch.cat([values, state], dim=1).view(torch.float32)
        found.append(both.reshape(len(block), group.dim + group.state_floats))
    return found


def _check(tables: Sequence[DynamicTableConfig]) -> None:
    assert tables, "a set without tables"
    first = tables[0]
    of_first, in_a_set = f"that of table {first.name}, ", "in a set of tables"
    for table in tables:
        _expect(table, "groups", _kinds(table), _kinds(first), of_first)
        _expect(table, "optimizer", replace(table.optimizer, lr=first.optimizer.lr), first.optimizer, of_first)
        _expect(table, "seed", table.seed, first.seed, of_first)
        _expect(table, "admission.kind", table.admission.kind, "none", f"{in_a_set} ")
        _expect(table, "optimizer.old_rows_factor", table.optimizer.old_rows_factor, 1, f"{in_a_set} ")
        _expect(table, "groups.learned", [group.learned for group in table.groups if group.learned], [], f"{in_a_set} ")
        if table.row_limit is not None:
            _expect(table, "eviction", table.eviction, "raise", f"{in_a_set} ")


def _expect(table: DynamicTableConfig, key: str, found: object, expected: object, which: str) -> None:
    if found != expected:
        raise ConfigError(f"table {table.name}: {key} is {found}; expected {which}{expected}")


def _kinds(table: DynamicTableConfig) -> list[tuple[object, ...]]:
    return [(group.name, group.dim, group.format, group.rounding, group.scale) for group in table.groups]
