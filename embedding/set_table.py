"""One table of a set, with the methods of `DynamicTable`: what saved states, expiry and statistics ask of a table."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera.embedding import growth
from tessera.embedding.decay import noted_now
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.set_admission import Filter
from tessera.embedding.set_snapshot import TableSnapshot
from tessera.embedding.set_update import RecordsUpdate
from tessera.embedding.table import BEFORE, COUNTERS, DynamicTable
from tessera.embedding.table_set import TableSet
from tessera.kernels.host_numbers import on_device
from tessera.kernels.records import Positions
from tessera.kernels.unique import positions_of

ID = 2  # column of what `RowsOfTable.read` gives


class SetTable:
    """Row numbers are places in the table, from 0 on, good as long as those of `DynamicTable`.

    Training asks the set. `lookup` in training counts as a step of the whole set, so it is for a set of one table.
    """

    def __init__(self, tables: TableSet, number: int) -> None:
        self.set, self.number = tables, number
        self.config, self.device = tables.tables[number], tables.device
        self._rows = tables.rows_of[number]
        self._evicted = tables.evicted[number]
        self._at_interval = [0] * len(COUNTERS)

    def __len__(self) -> int:
        """Return the number of rows in use."""
        return self.set.rows_in_use[self.number]

    @property
    def init_values(self) -> Tensor | None:
        """First values of new rows, float32 [width]; None: drawn from (seed, table, group, id)."""
        return self.set.init_values[self.number]

    @init_values.setter
    def init_values(self, values: Tensor | None) -> None:
        self.set.init_values[self.number] = values

    @property
    def decayed(self) -> float:
        """Sum of log(1 - rate decay) over the table's steps, as `decay.py` says; 0 where rows do not decay."""
        return 0.0 if self.set.decayed is None else float(self.set.decayed[self.number])

    @decayed.setter
    def decayed(self, value: float) -> None:
        if self.set.decayed is not None:
            self.set.decayed = self.set.decayed.clone()
            self.set.decayed[self.number] = value

    @property
    def admission(self) -> Filter | None:
        """The filter of unknown ids; None where all pass."""
        return self.set.admission.filters[self.number]

    def _bounds(self, ids: int) -> Tensor:
        bounds = torch.zeros(len(self.set.tables) + 1, dtype=torch.int64)
        bounds[self.number + 1 :] = ids
        return bounds.to(self.device)

    def _find(self, ids: Tensor) -> Tensor:
        return self.set.find(ids, self._bounds(ids.numel()))

    def lookup(self, ids: Tensor, now: int | Tensor, counts: Tensor | None = None, *, training: bool = True) -> Tensor:
        """Return the rows of a batch's ids, as `DynamicTable.lookup`."""
        if not training:
            return self._rows.places(self._find(ids))
        return self._rows.places(self.set.lookup(ids, self._bounds(ids.numel()), now, counts))

    def gather(self, rows: Tensor, inverse: Tensor | None = None) -> Tensor:
        """Return values of rows, as `DynamicTable.gather`."""
        return self.set.gather(self._rows.numbers(rows), inverse)

    def update(
        self, rows: Tensor, grads: Tensor, inverse: Tensor | None = None, lr: float | None = None, ids: object = None
    ) -> None:
        """Apply one optimizer step to rows, as `DynamicTable.update`. ids are not used: records know them."""
        rates, positions = self.set.rates, None
        if lr is not None:
            rates = torch.full_like(rates, lr)
        if inverse is not None:
            positions = Positions(*positions_of(inverse, torch.bincount(inverse, minlength=rows.numel())))
        self.set.update(self._rows.numbers(rows), grads, positions, rates)

    def begin_update(
        self, rows: Tensor, grads: Tensor, inverse: Tensor | None = None, lr: float | None = None, ids: object = None
    ) -> RecordsUpdate:
        """Do `update` where scales are learned, as `DynamicTable.begin_update`."""
        rates = self.set.rates.tolist() if lr is None else [lr] * len(self.set.tables)
        return RecordsUpdate(self.set, self._rows.numbers(rows), grads, inverse, rates)

    def begin_period(self) -> None:
        """Count the rows that exist now as old from here on: the optimizer's `old_rows_factor` slows them."""
        self.set.periods[self.number] += 1

    def expire(self, now: int, budget_rows: int | None = None) -> int:
        """Remove rows with now - last seen >= ttl_seconds, as `DynamicTable.expire`. Returns how many.

        `Engine.expire_if_due` calls it every `embedding.expire_every` steps, and a day's end for whole tables
        (`Daily.train_day`).
        """
        ttl, removed = self.config.ttl_seconds, 0
        if ttl is None:
            return 0
        for rows in self._rows.expired(now, ttl, budget_rows):
            if rows.numel():
                self.set.free(self.number, rows)
                removed += rows.numel()
        self.set.counters[COUNTERS.index("expired"), self.number] += removed
        if self.admission is not None:
            self.admission.expire(now, budget_rows)
        return removed

    def take_evicted(self, reader: str = "serving") -> Tensor:
        """Return ids evicted since this reader's last call that have no row now, as `DynamicTable.take_evicted`."""
        return self._without_row(self._evicted.take(reader))

    def evicted(self, reader: str) -> Tensor | None:
        """Return what `take_evicted` would, without taking it; None if some evicted ids are lost or the reader never
        asked."""
        return self._without_row(self._evicted.read(reader)) if self._evicted.complete(reader) else None

    def _without_row(self, ids: Tensor) -> Tensor:
        return ids[self._find(ids) < 0]

    def restore_changes(self, reader: str, touched: Tensor, evicted: Tensor) -> int:
        """Take over changes that another table had noted, as `DynamicTable.restore_changes`."""
        mark, rows = self.mark(), self._find(touched)
        self.set.changing(rows)
        self.set.store.set_marks(rows, on_device([self.number], self.device), mark)
        self._evicted.take(reader)
        self._evicted.add_for(reader, evicted)
        return mark

    def mark(self) -> int:
        """Return a point in time to ask `touched_since` about. Until the first one, changes are not noted."""
        self.set.mark += 1
        return self.set.mark

    def touched_since(self, mark: int, batch_rows: int = 1 << 18) -> Iterator[Tensor]:
        """Yield ids (int64 [k]) of rows that were added, updated or imported since `mark`; walks the table."""
        for _, meta in self._rows.walk(batch_rows, since=mark):
            yield meta[:, ID].contiguous()

    def export_rows(self, batch_rows: int = 1 << 16, since: int | None = None) -> Iterator[RowBatch]:
        """Yield rows in order of their numbers, at most `batch_rows` at once: all, or those touched since a mark.

        The set must not change meanwhile.
        """
        for rows, _ in self._rows.walk(batch_rows, since):
            yield self.set.store.batch_of(self.set.store.read(rows), self._rows.places(rows))

    def rows_in_use(self, since: int | None = None) -> Tensor:
        """Return the numbers of all rows, or of those touched since a mark: int64 [n], ascending."""
        found = [self._rows.places(rows) for rows, _ in self._rows.walk(1 << 20, since)]
        return torch.cat([torch.empty(0, dtype=torch.int64, device=self.device), *found])

    def read_rows(self, rows: Tensor) -> RowBatch:
        """Return rows in use (int64 [n]) as `export_rows` does; for no rows, empty tensors with the right dtypes."""
        return self.set.store.batch_of(self.set.store.read(self._rows.numbers(rows)), rows)

    def snapshot(self) -> TableSnapshot:
        """Return all rows as they are now, for another thread to read while this one goes on, until it is released."""
        return self.set.snapshot(self.number)

    def reserve(self, rows: int) -> None:
        """Reserve memory for the rows of an import at once, unless rows are in use. Raises TableFull."""
        limit = self.config.row_limit
        rows = rows if limit is None else min(rows, limit)
        if self._rows.end or not rows:
            return
        try:
            if not len(self.set):
                self.set.map.reserve(rows)
            self._rows.provide(rows, limited=False)
            self.set.store.touch_pages(self._rows.spans(0, rows))
        except torch.OutOfMemoryError as error:
            raise growth.full(self.config, 0, rows, error) from error

    def import_rows(self, batch: RowBatch) -> None:
        """Import rows as they are; a known id is replaced; as `DynamicTable.import_rows`. Raises TableFull."""
        if batch.ids.numel() == 0:
            return
        if int(batch.count.min()) < 1:
            raise ValueError(f"table {self.config.name}: counts of imported rows must be 1 or more")
        batch = batch.to(self.device)
        if self.config.decay_floats and batch.decay is None:
            batch.decay = noted_now(self.decayed, batch.count, self.config.optimizer)
        parts = self.set.store.stored_of(batch, self.config)
        if batch.rows is not None:
            rows = self._place(batch.ids, batch.rows)
        else:
            rows = self._find(batch.ids)
            unknown = (rows < 0).nonzero().flatten()
            if unknown.numel():
                rows[unknown] = self._take(batch.ids[unknown], rows)
        self.set.changing(rows)
        self.set.store.write(rows, parts, batch, self.number | self.set.mark << 32, BEFORE)
        self.set.limits.reset(self.number)

    def _take(self, ids: Tensor, spare: Tensor) -> Tensor:
        wanted = [0] * len(self.set.tables)
        wanted[self.number] = ids.numel()
        self.set.make_room(wanted, spare, self._bounds(spare.numel()))
        return self.set.take_rows(ids, torch.full_like(ids, self.number), wanted)

    def _place(self, ids: Tensor, places: Tensor) -> Tensor:
        """Give ids the rows that they had in the table whose state is imported."""
        self._grow_to(int(places.max()) + 1)
        rows = self._rows.numbers(places)
        self.set.map.insert(ids, rows, torch.full_like(ids, self.number))
        self.set.rows_in_use[self.number] += ids.numel()
        return rows

    def _grow_to(self, end: int) -> None:
        try:
            self._rows.provide(end, limited=False)
        except torch.OutOfMemoryError as error:
            raise growth.full(self.config, len(self), end - self._rows.end, error) from error
        self._rows.end = max(self._rows.end, end)

    def export_state(self) -> dict[str, Tensor]:
        """Return all state of a table besides its rows, as `DynamicTable.export_state`."""
        counters = self.set.counters[:, self.number].clone()
        state = {"step": torch.tensor(self.set.step), "counters": counters}
        if self.config.knows_periods:
            state["period"] = self.set.periods[self.number].cpu().clone()
        free = self._rows.places(self._rows.free.rows)
        state |= {"rows/free": free.clone(), "rows/end": torch.tensor(self._rows.end)}
        state["rows/cursor"] = torch.tensor(self._rows.cursor)
        if self.admission is not None:
            state |= {f"admission/{name}": value for name, value in self.admission.export_state().items()}
        return state

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` holds, as `DynamicTable.import_state`. A step is that of the set."""
        if "step" in state:
            self.set.step = max(self.set.step, int(state["step"]))
        if "period" in state:
            self.set.periods[self.number] = int(state["period"])
        if "counters" in state:
            self.set.counters[:, self.number] = state["counters"]
            self.reset_interval()
        if "rows/end" in state:
            self._grow_to(int(state["rows/end"]))
            self._rows.free.replace(self._rows.numbers(state["rows/free"].to(self.device)))
            self._rows.cursor = int(state["rows/cursor"])
        of_filter = {key.partition("/")[2]: value for key, value in state.items() if key.startswith("admission/")}
        if of_filter and self.admission is not None:
            self.admission.import_state(of_filter)

    @property
    def nbytes(self) -> int:
        """Bytes in use: records, the table's share of the id map, admission filter; not what is reserved but
        untouched."""
        rows = self._rows.end * self.set.layout.bytes + self._rows.free.nbytes
        ends = [rows.end + 1 for rows in self.set.rows_of]
        share = self.set.map.nbytes * ends[self.number] // sum(ends)
        return rows + share + (0 if self.admission is None else self.admission.nbytes) + self._evicted.nbytes

    def stats(self, *, interval: bool = False) -> dict[str, float]:
        """Return the table's current size, and its counts since start or (interval) since `reset_interval`, as
        `DynamicTable.stats`."""
        counts = self.set.counters[:, self.number].tolist()
        if interval:
            counts = [count - before for count, before in zip(counts, self._at_interval, strict=True)]
        rows = len(self)
        sizes = {"rows": rows, "bytes": self.nbytes, "bytes_per_row": self.nbytes / max(1, rows)}
        return sizes | dict(zip(COUNTERS, counts, strict=True))

    def reset_interval(self) -> None:
        """Begin a new interval of the statistics."""
        self._at_interval = self.set.counters[:, self.number].tolist()


OwnedTable = SetTable | DynamicTable  # a rank's part of a table: of a set, or by itself
