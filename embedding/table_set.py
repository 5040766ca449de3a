"""All tables of one layout on one rank as one: one id map, one store of records, one call for all of them.

What `DynamicTable` does for one table this does for any number, in as many operations; `SetTable` (`parts`) is one
table of a set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tessera.embedding import decay, growth
from tessera.embedding.cold_queues import ColdQueues
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.evicted import EvictedIds
from tessera.embedding.optim import clipped, merged
from tessera.embedding.record_store import RecordStore
from tessera.embedding.rows_of_tables import RowsOfTable, RowsOfTables, Victims
from tessera.embedding.set_admission import SetAdmission
from tessera.embedding.set_layout import check_alike, keys_of_set
from tessera.embedding.set_limits import SetLimits
from tessera.embedding.set_snapshot import KeptRows, TableSnapshot
from tessera.embedding.table import COUNTERS
from tessera.kernels import backend, records
from tessera.kernels.id_map import IdMap
from tessera.kernels.random import stream_at
from tessera.kernels.record_layout import COUNT, RecordLayout
from tessera.kernels.records import FirstValues, Positions, Unknown

T = TypeVar("T")
Seen = tuple[Tensor, Tensor, RecordLayout, int | Tensor, Tensor | None]  # what ops are told of a batch that is noted


class NewIds(NamedTuple):
    """Ids of a batch that get a row, as `Unknown` names them, with times and counts as `TableSet.lookup` takes them."""

    positions: Tensor
    tables: Tensor
    of_tables: list[int]
    segments: Tensor | None
    times: int | Tensor
    counts: Tensor | None


class TableSet:
    """Tables that have the same groups, but for the first values' spread, the same optimizer, but for its learning
    rate and decay, and the same seed. Each has its own admission, limit, eviction and TTL.

    Ids are flat: those of table t (its place in `tables`) are at bounds[t] to bounds[t + 1] - 1, bounds int64 [T + 1].
    All tensors that go in and out live on `device`. Row numbers are those of all tables together, and good until the
    next call that may free rows: `lookup` in training at a limit, expiry and import of a table.

    Attributes:
        tables: the configs, in order. layout: of a record.
        rows_in_use: of each table. counters: what happened since the beginning, int64 [len(COUNTERS), T], on the CPU.
        rates: learning rates, float64 [T].
        decayed: of each table the sum of log(1 - rate decay) over its steps, float64 [T]; None: rows do not decay.
        init_values: of each table, first values of new rows, float32 [width], on the device; None: drawn from (seed,
        table, group, id).

    Raises ConfigError, one line, for tables that are not alike.
    """

    def __init__(self, tables: Sequence[DynamicTableConfig], device: torch.device | str = "cpu") -> None:
        self.tables, self.device = tuple(tables), torch.device(device)
        check_alike(self.tables)
        first = self.tables[0]
        self.map = IdMap(device)
        self.store = RecordStore(first, device)
        self.rows_in_use = [0] * len(tables)
        self.counters = torch.zeros((len(COUNTERS), len(tables)), dtype=torch.int64)
        self.rates = torch.tensor([table.optimizer.lr for table in tables], dtype=torch.float64, device=device)
        self.decayed = torch.zeros_like(self.rates) if first.decay_floats else None
        self._decays = torch.tensor([table.optimizer.decay for table in tables], dtype=torch.float64, device=device)
        self.init_values: list[Tensor | None] = [None] * len(tables)
        self.periods = torch.zeros(len(tables), dtype=torch.int64, device=device)
        self.admission = SetAdmission(self.tables, self.device)
        self.evicted = [EvictedIds(table.evicted_kept, device) for table in tables]
        self.step = self.mark = 0
        self._rows = RowsOfTables(len(tables), self.store)
        self.rows_of = [RowsOfTable(self._rows, self.store, number) for number in range(len(tables))]
        on_gpu = self.device.type == "cuda" and backend.backend("cuda") == "triton"
        queues = ColdQueues(self.tables, self._rows, self.store, self.map) if on_gpu else None
        self.limits = SetLimits(self.tables, self.rows_of, queues)
        self._queues = self.limits.queues
        self._optimizer = first.optimizer
        self._keys = keys_of_set(self.tables, device)
        scales = tuple(group.scale for group in first.groups)
        self._first = FirstValues(self._optimizer.initial_accumulator, scales)
        self._kept: list[KeptRows] = []
        self._kept_change = threading.Lock()  # they are released by the threads that read them
        self._spare_copies: list[Tensor] = []
        self._unchanged = False  # since the last of `_kept` was made

    def __len__(self) -> int:
        """Return the number of rows in use, of all tables."""
        return len(self.map)

    @property
    def layout(self) -> RecordLayout:
        return self.store.layout

    @property
    def width(self) -> int:
        """Floats of one row that a look-up returns: those of all groups."""
        return self.layout.width

    @property
    def reserved_bytes(self) -> int:
        """Bytes of records that are reserved, in use or not."""
        return self.store.reserved * self.layout.bytes

    def find(self, ids: Tensor, bounds: Tensor) -> Tensor:
        """Return the rows of ids: int64 [n], -1 for an id that has none. Nothing changes."""
        return records.find(self.map, self.store.chunks, ids, bounds, self.layout)

    def lookup(self, ids: Tensor, bounds: Tensor, now: int | Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the rows of a batch's ids in training: int64 [u], -1 for an id that is not admitted.

        ids: int64 [u], distinct within a table; now: seconds, one number or int64 [u]; counts: int64 [u], how often
        each id is in the batch, 1 or more (None: once). An unknown id is counted by its table's admission filter and
        gets a row if it passes. All rows are touched. Call it on every step, without ids too.

        Raises TableFull at a table's limit if its policy is to raise, if the batch alone needs more rows, or where a
        GPU has no memory for more; ids then have the rows that they had.
        """
        if self._kept:
            self._save_old(self.find(ids, bounds))
        seen = ids, bounds, self.layout, now, counts
        rows, unknown, noted = self._look_up(seen)
        new = None if unknown is None else self._admit(unknown, ids, now, counts)
        victims = None
        if self._queues is not None:
            victims = self._choose_victims(seen, rows, unknown, new, noted=noted)
        else:
            if new is not None and self.limits and self.make_room(new.of_tables, rows, bounds):
                new = new._replace(segments=None)  # ids have left them
            if not noted:
                records.find(self.map, self.store.chunks, *seen)
        if new is not None and new.positions.numel():
            rows[new.positions] = self._add(ids[new.positions], new, victims)
        self.step += 1
        self._unchanged = False
        return rows

    def _look_up(self, seen: Seen) -> tuple[Tensor, Unknown | None, bool]:
        """Return rows of a batch, what has none, and whether rows were touched: not where TableFull may follow."""
        ids, bounds, queues = seen[0], seen[1], self._queues
        if queues is not None:
            most, look = queues.most(self.rows_in_use, ids.numel()), queues.look if queues.filled else None
            found = records.find_unknown(self.map, self.store.chunks, *seen, most, look)
            if look is not None:
                queues.learn(found.told)
            return found.rows, found.unknown, found.noted
        if self.limits.may_be_full(bounds, self.rows_in_use):
            rows = self.find(ids, bounds)
            return rows, records.unknown_of(rows, bounds), False
        found = records.find_unknown(self.map, self.store.chunks, *seen)
        return found.rows, found.unknown, True

    def _choose_victims(
        self, seen: Seen, rows: Tensor, unknown: Unknown | None, new: NewIds | None, *, noted: bool
    ) -> Victims | None:
        """Return the rows that new ids need, on a GPU, and note what was not noted before. Raises TableFull."""
        assert self._queues is not None
        bounds, used = seen[1], self.rows_in_use
        wanted = [0] * len(used) if new is None else new.of_tables
        missing, known = self.limits.missing(used, wanted), None
        if not noted and unknown is not None and any(missing):
            known = [size - none for size, none in zip(bounds.diff().tolist(), unknown.of_tables, strict=True)]
        self.limits.check(missing, used, wanted, known)
        if not noted:
            records.find(self.map, self.store.chunks, *seen)
            if self._queues.filled:
                self._queues.learn(self._queues.look().tolist())
        return self._queues.take(missing, rows, bounds) if any(missing) else None

    def _admit(self, unknown: Unknown, ids: Tensor, now: int | Tensor, counts: Tensor | None) -> NewIds:
        """Count unknown ids; return those that get a row now."""
        positions, tables, seen, _, segments = unknown
        often = None if counts is None else counts[positions]
        if often is not None and often.device.type == "cpu" and int(often.min()) < 1:
            raise ValueError("counts must be 1 or more")
        times = now[positions] if isinstance(now, Tensor) and now.numel() > 1 else now
        wanted, passed = seen, self.admission.admit(ids[positions], tables, seen, often, times, self.step)
        if passed is not None:
            chosen = passed.nonzero().flatten()
            positions, tables, segments = positions[chosen], tables[chosen], None
            often = None if often is None else often[chosen]
            times = times[chosen] if isinstance(times, Tensor) and times.numel() > 1 else times
            wanted = torch.bincount(tables, minlength=len(self.tables)).tolist()
        self.counters[:3] += torch.tensor([seen, wanted, [new - more for new, more in zip(seen, wanted, strict=True)]])
        return NewIds(positions, tables, wanted, segments, times, often)

    def make_room(self, wanted: Sequence[int], spare: Tensor, bounds: Tensor) -> bool:
        """Evict the coldest rows of tables at their limit, none of `spare` (those of table t between its bounds), until
        so many more fit. Returns whether any was evicted. Raises TableFull."""
        missing = self.limits.missing(self.rows_in_use, wanted)
        over = [table for table, rows in enumerate(missing) if rows]
        ends = bounds.tolist() if over else []
        for table in over:
            own, used = spare[ends[table] : ends[table + 1]], self.rows_in_use[table]
            self.free(table, self.limits.coldest(table, missing[table], used, wanted[table], own))
            self.counters[COUNTERS.index("evicted"), table] += missing[table]
        return bool(over)

    def _give_up(self, victims: Victims) -> Tensor:
        """Take the ids of victims out of the map; return how many each of its segments has lost."""
        self._save_old(victims.rows)
        self.counters[COUNTERS.index("evicted")] += torch.tensor(victims.counts)
        self.rows_in_use = [used - count for used, count in zip(self.rows_in_use, victims.counts, strict=True)]
        if any(evicted.wanted for evicted in self.evicted):
            for evicted, ids in zip(self.evicted, victims.ids.split(victims.counts), strict=True):
                evicted.add(ids)
        return self.map.erase_places(victims.places)

    def _add(self, ids: Tensor, new: NewIds, victims: Victims | None) -> Tensor:
        """Add rows for new ids, with their first values; return them: int64 [k]."""
        tables, wanted = new.tables, new.of_tables
        rows = self.take_rows(ids, tables, wanted, new.segments, victims)
        how = (self.layout, self._keys, self._first, new.times, new.counts, self.mark)
        records.add(self.store.chunks, rows, ids, tables, *how)
        if self.store.with_periods:
            self.store.set_periods(rows, self.periods[tables])
        if self.decayed is not None:
            self.store.set_decay(rows, decay.noted_now(self.decayed[tables], torch.ones_like(rows), self._optimizer))
        if self._queues is not None:
            self._queues.add(rows)
        elif self.limits:
            for table, own in enumerate(rows.split(list(wanted))):
                self.limits.added(table, own)
        for table, given, own in _each(rows, wanted, self.init_values):
            self._start_at(given, own, table)
        return rows

    def _start_at(self, given: Tensor, rows: Tensor, table: int) -> None:
        """Let new rows of a table begin at values, float32 [width], instead of random ones."""
        store = self.store.store_for(rows.numel(), self.tables[table])
        places = torch.arange(rows.numel(), device=self.device)
        store.initialise(places, self.store.ids_of(rows), given)
        self.store.write_groups(rows, store.stored(places))

    def take_rows(
        self,
        ids: Tensor,
        tables: Tensor,
        wanted: Sequence[int],
        segments: Tensor | None = None,
        victims: Victims | None = None,
    ) -> Tensor:
        """Give rows to distinct, unknown ids (int64 [k]) of tables (int64 [k], ascending, so many of each). segments:
        as `Unknown` has them. victims: rows that are taken from their ids and given to these.

        Raises TableFull where a GPU has no memory for them or, for tables without a limit, only that of the reserve.
        Rows and ids are then as they were, or victims are freed.
        """
        before, limited, gave_up = self._rows.state(), self.limits.some_without, False
        try:
            if victims is None:
                rows = self._rows.take(tables, wanted, limited=limited)
            else:
                rows = self._rows.take_after(victims, tables, wanted, limited=limited)
                gone, gave_up = self._give_up(victims), True
                segments = None if segments is None else segments.sub_(gone)
            try:
                if segments is None:
                    self.map.insert(ids, rows, tables)
                else:
                    self.map.place(ids, rows, tables, segments)
            except torch.OutOfMemoryError:
                self.map.erase(ids, tables)
                raise
        except torch.OutOfMemoryError as error:
            self._rows.restore(before)
            if victims is not None and gave_up:
                self.store.clear(victims.rows)
                for rows_of, own in zip(self.rows_of, victims.rows.split(victims.counts), strict=True):
                    rows_of.free.give_back(own)
            if self._queues is not None:
                self._queues.reset()
            table = max(range(len(wanted)), key=wanted.__getitem__)
            raise growth.full(self.tables[table], self.rows_in_use[table], wanted[table], error) from error
        self.rows_in_use = [used + more for used, more in zip(self.rows_in_use, wanted, strict=True)]
        return rows

    def gather(self, rows: Tensor, inverse: Tensor | None = None) -> Tensor:
        """Return values of rows, all groups side by side: float32 [u, width], or [n, width] with inverse int64 [n].

        Row -1 gives zeros.
        """
        return records.gather(self.store.chunks, rows, self.layout, inverse, self.decayed)

    def update(
        self, rows: Tensor, grads: Tensor, positions: Positions | None = None, rates: Tensor | None = None
    ) -> None:
        """Apply one optimizer step to the rows of a batch, after their `lookup`.

        rows: int64 [u], distinct but for -1, which is skipped; grads: float32 [n, width], where n == u, or
        positions says which of them belong to each row (they are summed in order); rates: float64 [T],
        learning rates instead of `rates`.
        """
        rates = self.rates if rates is None else rates
        now = None if self.decayed is None else self.decayed + decay.of_step(rates, self._decays)
        self._save_old(rows)
        self._unchanged = False
        if self._optimizer.clip_norm is not None:
            grads = clipped(merged(grads, positions, rows.numel()), self._optimizer.clip_norm)
            positions = None
        parts = [(rows, rates)]
        if self.store.with_periods and self.store.chunks:
            old = self.old(rows)
            slower = rates * self._optimizer.old_rows_factor
            parts = [(rows.masked_fill(~old, -1), slower), (rows.masked_fill(old, -1), rates)]
        settings = self._optimizer.settings(self._optimizer.lr)
        for part, speeds in parts:
            how = (self.layout, settings, speeds, self._keys, self.step, positions, self.mark, now)
            records.update(self.store.chunks, part, grads, *how, power=self._optimizer.decay_count_power)
        self.decayed = now

    def pass_step(self, rows: Tensor, rates: Tensor) -> Tensor:
        """Let a step of these rates, float64 [T], pass for the decay of all tables, of which these rows (int64 [u], -1
        skipped) are updated by the caller. Returns the part of its values that each keeps before: float32 [u]."""
        assert self.decayed is not None
        before, tables = self.decayed, self.store.tables_of(rows)
        self.decayed = before + decay.of_step(rates, self._decays)
        now = self.decayed[tables]
        kept = decay.kept(self.store.decay_of(rows), now, before[tables])
        counts = self.store.meta(rows)[:, COUNT]
        self.store.set_decay(rows, decay.noted_now(now, counts, self._optimizer))
        return kept

    def streams_of_rounding(self) -> Tensor:
        """Return what random rounding in this step is seeded by besides ids: int64 [T, groups]."""
        return stream_at(self._keys.numbers[:, :, 1], self.step)

    def old(self, rows: Tensor) -> Tensor:
        """Return bool [n], True for rows that were added before the period of their table began."""
        periods = self.periods[self.store.tables_of(rows).clamp(max=len(self.tables) - 1)]
        return self.store.periods_of(rows) < periods

    def free(self, table: int, rows: Tensor) -> None:
        """Clear rows in use of a table, so that its other ids may take them."""
        self._save_old(rows)
        self._unchanged = False
        ids = self.store.ids_of(rows)
        self.map.erase(ids, torch.full_like(ids, table))
        self.store.clear(rows)
        self.rows_of[table].free.give_back(rows)
        self.rows_in_use[table] -= rows.numel()
        self.evicted[table].add(ids)
        if self._queues is not None:
            self._queues.freed()

    def changing(self, rows: Tensor) -> None:
        """Prepare for a change of rows by the caller."""
        self._save_old(rows)
        self._unchanged = False

    def _save_old(self, rows: Tensor) -> None:
        """Copy rows that are about to change into the snapshots."""
        for kept in self._kept:
            kept.save_old(rows)

    def snapshot(self, table: int) -> TableSnapshot:
        """Return the rows of a table as they are now, for another thread to read, until it is released."""
        self.store.grow_to(1, limited=False)  # a store without a chunk has nothing to read
        with self._kept_change:
            if not (self._kept and self._unchanged and table not in self._kept[-1].tables):
                free = [rows.free.rows for rows in self.rows_of]
                spans = [span for rows in self.rows_of for span in rows.unused_spans()]
                copies, self._spare_copies = self._spare_copies, []
                kept = KeptRows(self.store, self._rows.extents.end, free, spans, copies)
                self._kept, self._unchanged = [*self._kept, kept], True
            self._kept[-1].tables.add(table)
            return TableSnapshot(self._kept[-1], self.rows_of[table], self._release)

    def _release(self, kept: KeptRows) -> None:
        """Forget what no snapshot reads any more. Its memory is reused by the next one."""
        with self._kept_change:
            kept.users -= 1
            if not kept.users:
                self._kept = [other for other in self._kept if other is not kept]
                self._spare_copies = kept.copies


def _each(rows: Tensor, counts: Sequence[int], what: Sequence[T | None]) -> Iterator[tuple[int, T, Tensor]]:
    """Yield (table, what it has, its rows) for tables that have it and rows; those of tables lie one behind the
    other."""
    if any(one is not None for one in what):
        for table, (one, own) in enumerate(zip(what, rows.split(list(counts)), strict=True)):
            if one is not None and own.numel():
                yield table, one, own
