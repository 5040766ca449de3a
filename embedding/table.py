"""A table that gives every id a row of its own, on one rank. The methods follow the life of a row.

Tables with a cache on the host are of this kind; all others are tables of a set (`set_table.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera.embedding import growth
from tessera.embedding.admission import admission_filter
from tessera.embedding.alpt import TwoPassUpdate
from tessera.embedding.cold_rows import ColdRows
from tessera.embedding.config import DynamicTableConfig, key_of
from tessera.embedding.decay import DecaySum
from tessera.embedding.errors import TableFull
from tessera.embedding.evicted import EvictedIds
from tessera.embedding.optim import by_age
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.row_index import COLUMNS, ID, PERIOD, RowIndex
from tessera.embedding.row_store import RowStore
from tessera.embedding.snapshot import Snapshot, Snapshots
from tessera.kernels.gather import gather
from tessera.kernels.touch import COUNT, LAST_SEEN

COUNTERS = ("new", "admitted", "rejected", "expired", "evicted")
BEFORE = -1  # the period of rows that come from elsewhere: before any of this table


class DynamicTable:
    """All tensors that go in and out live on `device`. Row numbers are good until the next call that may free rows:
    `lookup` in training at a limit, `expire`, `import_rows`.

    Attributes:
        init_values: initial values of new rows, float32 [width]; None: drawn from (seed, table, group, id).
    """

    def __init__(self, config: DynamicTableConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._index = RowIndex(config.chunk_rows, device, with_periods=config.knows_periods)
        self._store = RowStore(config, device, DecaySum(config.optimizer) if config.decay_floats else None)
        key = key_of(config.name)
        self.admission = admission_filter(config.admission, config.seed, key, config.ttl_seconds, device)
        self._limit = config.row_limit
        self._cold = None if config.eviction == "raise" else ColdRows(self._index, config.eviction)
        self._evicted = EvictedIds(config.evicted_kept, device)
        self._snapshots = Snapshots()
        self._mark = 0  # no marks are written before the first one is asked for
        self._step = self._period = 0
        self.init_values: Tensor | None = None
        self._total = dict.fromkeys(COUNTERS, 0)
        self._at_interval = dict(self._total)

    def __len__(self) -> int:
        """Return the number of rows in use."""
        return len(self._index)

    def lookup(self, ids: Tensor, now: int | Tensor, counts: Tensor | None = None, *, training: bool = True) -> Tensor:
        """Return the rows of a batch's ids: int64 [u], -1 for an id that has none.

        ids: int64 [u], distinct; now: seconds, one number or int64 [u]; counts: int64 [u], how often each id is in
        the batch, 1 or more (None: once). In training an unknown id is counted by the admission filter and gets a row
        if it passes, and all rows are touched; call it on every step, without ids too. Otherwise nothing changes:
        `now` and `counts` are not used.

        Raises TableFull at the limit if the policy is to raise, if the batch alone needs more rows, or where a GPU has
        no memory for more; ids then have the rows that they had.
        """
        rows = self._index.find(ids)
        if not training:
            return rows
        unknown = (rows < 0).nonzero().flatten()
        if unknown.numel():
            passed = self._admit(ids, unknown, now, counts)
            if passed.numel():
                self._make_room(passed.numel(), spare=rows)
                rows[passed] = self._add(ids[passed])
        self._step += 1
        self._snapshots.save_old(rows)
        self._index.touch(rows, now, counts)
        return rows

    def _admit(self, ids: Tensor, unknown: Tensor, now: int | Tensor, counts: Tensor | None) -> Tensor:
        """Return the positions of those unknown ids that get a row now."""
        if counts is not None and counts.device.type == "cpu" and int(counts[unknown].min()) < 1:
            raise ValueError(f"table {self.config.name}: counts must be 1 or more")
        passed = unknown
        if self.admission is not None:
            often = torch.ones_like(unknown) if counts is None else counts[unknown]
            times = now[unknown] if isinstance(now, Tensor) else now
            passed = unknown[self.admission.admit(ids[unknown], often, times, self._step)]
        rejected = unknown.numel() - passed.numel()
        self._count(new=unknown.numel(), admitted=passed.numel(), rejected=rejected)
        return passed

    def _make_room(self, wanted: int, spare: Tensor) -> None:
        """Evict the coldest rows, none of `spare`, until `wanted` more fit the limit."""
        missing = 0 if self._limit is None else len(self) + wanted - self._limit
        if missing <= 0:
            return
        full = f"table {self.config.name}: limit of {self._limit:,} rows, {len(self):,} in use, {wanted:,} more wanted"
        if self._cold is None:
            raise TableFull(f"{full}; raise max_rows or max_bytes, set ttl_seconds, or choose eviction lru or lfu")
        rows = self._cold.take(missing, spare) if missing <= len(self) else None
        if rows is None:
            raise TableFull(f"{full} by one batch; raise max_rows or max_bytes, or make the batch smaller")
        self._free(rows)
        self._count(evicted=rows.numel())

    def _add(self, ids: Tensor) -> Tensor:
        """Add rows for new ids, with their initial values; return them."""
        rows = growth.take_rows(self.config, self._index, self._store, ids, self._mark, self._period)
        self._store.initialise(rows, ids, self.init_values)
        self._store.note_new(rows)
        if self._cold is not None:
            self._cold.add(rows)
        return rows

    def gather(self, rows: Tensor, inverse: Tensor | None = None) -> Tensor:
        """Return values of rows, all groups side by side: float32 [u, width], or [n, width] with inverse int64 [n].

        Row -1 gives zeros.
        """
        return self._store.gather(rows, inverse)

    def update(
        self,
        rows: Tensor,
        grads: Tensor,
        inverse: Tensor | None = None,
        lr: float | None = None,
        ids: Tensor | None = None,
    ) -> None:
        """Apply one optimizer step to the rows of a batch, after their `lookup`.

        rows: int64 [u], distinct but for -1, which is skipped; grads: float32 [n, width], where n == u, or
        inverse: int64 [n] names the place in `rows` that each gradient belongs to (they are summed in order);
        lr: instead of the configured learning rate; ids: int64 [u] of the rows, if the caller has them at hand.
        """
        self._snapshots.save_old(rows)
        ids = self._ids_of(rows, ids)
        parts, grads, inverse = by_age(rows, self._old(rows), grads, inverse, self.config.optimizer, lr)
        kept = self._store.pass_step(rows, lr, self._index.counts_of)
        for part, rate in parts:
            self._store.update(part, grads, inverse, rate, ids, self._step, kept)
        if self._mark:
            self._index.set_mark(rows, self._mark)

    def begin_update(
        self,
        rows: Tensor,
        grads: Tensor,
        inverse: Tensor | None = None,
        lr: float | None = None,
        ids: Tensor | None = None,
    ) -> TwoPassUpdate:
        """Do `update` where scales are learned. The result gives the values of the second pass and stores the rows
        by its gradient."""
        self._snapshots.save_old(rows)
        update = TwoPassUpdate(self._store, rows, self._ids_of(rows, ids), self._step)
        parts, grads, inverse = by_age(rows, self._old(rows), grads, inverse, self.config.optimizer, lr)
        update.update(grads, inverse, parts, self._store.pass_step(rows, lr, self._index.counts_of))
        if self._mark:
            self._index.set_mark(rows, self._mark)
        return update

    def begin_period(self) -> None:
        """Count the rows that exist now as old from here on: the optimizer's `old_rows_factor` slows them."""
        self._period += 1

    @property
    def decayed(self) -> float:
        """Sum of log(1 - rate decay) over the table's steps, as `decay.py` says; 0 where rows do not decay."""
        return 0.0 if self._store.decay is None else self._store.decay.now

    @decayed.setter
    def decayed(self, value: float) -> None:
        if self._store.decay is not None:
            self._store.decay.now = value

    def _old(self, rows: Tensor) -> Tensor | None:
        """Return bool [u], True for rows (int64 [u]) added before the period began; None if that does not matter."""
        if not self.config.knows_periods or not self._index.meta:
            return None
        return gather(self._index.meta, rows, 1, begin=PERIOD).flatten() < self._period

    def _ids_of(self, rows: Tensor, ids: Tensor | None) -> Tensor | None:
        """Return the ids that seed stochastic rounding; None if not needed."""
        if ids is not None or not self._store.needs_ids or not self._index.meta:
            return ids
        return gather(self._index.meta, rows, 1, begin=ID).flatten()

    def expire(self, now: int, budget_rows: int | None = None) -> int:
        """Remove rows with now - last seen >= ttl_seconds. Returns how many.

        budget_rows: look at so many rows only, those after the ones looked at last time (None: at all). The ids that
        the exact admission filter counts expire by the same rule. Without ttl_seconds nothing expires.
        """
        if self.config.ttl_seconds is None:
            return 0
        before = self._total["expired"]
        for rows in self._index.expired(now, self.config.ttl_seconds, budget_rows):
            if rows.numel():
                self._free(rows)
                self._count(expired=rows.numel())
        if self.admission is not None:
            self.admission.expire(now, budget_rows)
        return self._total["expired"] - before

    def _free(self, rows: Tensor) -> None:
        """Clear rows, so that other ids may take them."""
        self._snapshots.save_old(rows)
        self._store.clear(rows)
        self._evicted.add(self._index.remove(rows))

    def take_evicted(self, reader: str = "serving") -> Tensor:
        """Return ids evicted (expired or at the limit) since this reader's last call that have no row now: distinct,
        int64 [k].

        A reader's first call gives none: until then they are not noted for it. Of more than `evicted_kept` only the
        last are known.
        """
        return self._without_row(self._evicted.take(reader))

    def evicted(self, reader: str) -> Tensor | None:
        """Return what `take_evicted` would, without taking it; None if some evicted ids are lost or the reader never
        asked."""
        return self._without_row(self._evicted.read(reader)) if self._evicted.complete(reader) else None

    def _without_row(self, ids: Tensor) -> Tensor:
        return ids[self._index.find(ids) < 0]

    def restore_changes(self, reader: str, touched: Tensor, evicted: Tensor) -> int:
        """Take over changes that another table had noted and its reader had not taken: ids (int64, distinct) touched
        and ids evicted. Returns a mark since which the first count as touched; the reader's next `take_evicted` gives
        the second."""
        mark = self.mark()
        self._index.set_mark(self._index.find(touched), mark)
        self._evicted.take(reader)
        self._evicted.add_for(reader, evicted)
        return mark

    def mark(self) -> int:
        """Return a point in time to ask `touched_since` about. Until the first one, changes are not noted."""
        self._mark += 1
        return self._mark

    def touched_since(self, mark: int, batch_rows: int = 1 << 18) -> Iterator[Tensor]:
        """Yield ids (int64 [k]) of rows that were added, updated or imported since `mark`; walks the table."""
        for _, meta in self._index.walk(batch_rows, since=mark):
            yield meta[:, ID].contiguous()

    def export_rows(self, batch_rows: int = 1 << 16, since: int | None = None) -> Iterator[RowBatch]:
        """Yield rows in order of their numbers, at most `batch_rows` at once: all, or those touched since a mark.

        The table must not change meanwhile.
        """
        for rows, meta in self._index.walk(batch_rows, since):
            yield self._read(rows, meta)

    def rows_in_use(self, since: int | None = None) -> Tensor:
        """Return the numbers of all rows, or of those touched since a mark: int64 [n], ascending."""
        found = [rows for rows, _ in self._index.walk(1 << 20, since)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=self.device)

    def read_rows(self, rows: Tensor) -> RowBatch:
        """Return rows in use (int64 [n]) as `export_rows` does; for no rows, empty tensors with the right dtypes."""
        self._store.grow_to(1)  # a store without a chunk does not know what its rows are made of
        return self._read(rows, self._index.read(rows).long())

    def _read(self, rows: Tensor, meta: Tensor) -> RowBatch:
        return self._batch(rows, meta, self._store.read(rows), self._store.noted(rows))

    def _batch(
        self, rows: Tensor, meta: Tensor, stored: tuple[Tensor, Tensor, Tensor | None], decay: Tensor | None
    ) -> RowBatch:
        values, state, scales = stored
        return RowBatch(
            ids=meta[:, ID].contiguous(),
            values=values,
            state=state,
            last_seen=meta[:, LAST_SEEN].contiguous(),
            count=meta[:, COUNT].contiguous(),
            rows=rows,
            scale=scales,
            period=meta[:, PERIOD].contiguous() if self.config.knows_periods else None,
            decay=decay,
        )

    def snapshot(self) -> Snapshot:
        """Return all rows as they are now, for another thread to read while this one goes on, until it is released."""
        self._store.grow_to(1)  # as in `read_rows`
        none = [torch.empty((0, COLUMNS + self.config.knows_periods), dtype=torch.int64, device=self.device)]
        chunks = [self._index.meta or none, *(group.chunks for group in self._store.columns)]

        def batch_of(rows: Tensor, raw: list[Tensor]) -> RowBatch:
            decay = None if self._store.decay is None else raw[-1]
            return self._batch(rows, raw[0], self._store.decode(raw[1:]), decay)

        return self._snapshots.add(chunks, self._index.end, self._index.free, batch_of)

    def reserve(self, rows: int) -> None:
        """Reserve memory for the rows of an import at once, unless rows are in use. Raises TableFull as `lookup`."""
        if not self._index.end:
            rows = rows if self._limit is None else min(rows, self._limit)
            growth.reserve(self.config, self._index, self._store, rows)

    def import_rows(self, batch: RowBatch) -> None:
        """Import rows as they are; a known id is replaced. Raises TableFull as `lookup`.

        Tensors of the batch may be on the CPU. batch.ids must be distinct. If batch.rows is given, every id must be
        unknown and gets the row it had: then the `rows/` part of the exported state must be imported too.
        """
        if batch.ids.numel() == 0:
            return
        if int(batch.count.min()) < 1:
            raise ValueError(f"table {self.config.name}: counts of imported rows must be 1 or more")
        batch = batch.to(self.device)
        if batch.rows is not None:
            rows = batch.rows
            self._index.place(batch.ids, rows)
        else:
            rows = self._index.find(batch.ids)
            unknown = (rows < 0).nonzero().flatten()
            if unknown.numel():
                self._make_room(unknown.numel(), spare=rows)
                taken = batch.ids[unknown], self._mark, self._period
                rows[unknown] = growth.take_rows(self.config, self._index, self._store, *taken)
        self._store.grow_to(self._index.end)
        self._snapshots.save_old(rows)
        period = BEFORE if batch.period is None else batch.period
        self._index.write(rows, batch.last_seen, batch.count, batch.ids, self._mark, period)
        self._store.write_batch(rows, batch)
        if self._cold is not None:
            self._cold.reset()

    def export_state(self) -> dict[str, Tensor]:
        """Return all state of a table besides its rows: `step`, `counters`, `period`, `rows/...` and `admission/...`.

        With it and the rows with their numbers, a new table goes on exactly as this one would.
        """
        state = {"step": torch.tensor(self._step), "counters": torch.tensor(list(self._total.values()))}
        if self.config.knows_periods:
            state["period"] = torch.tensor(self._period)
        state |= {f"rows/{name}": value for name, value in self._index.export_state().items()}
        if self.admission is not None:
            state |= {f"admission/{name}": value for name, value in self.admission.export_state().items()}
        return state

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` holds. Leave `rows/` out where rows are imported without their numbers.

        The state of an exact filter may be cut by id (`admission/ids`, `counts`, `last_seen`) and imported in parts.
        """
        if "step" in state:
            self._step = int(state["step"])
        if "period" in state:
            self._period = int(state["period"])
        if "counters" in state:
            self._total = dict(zip(COUNTERS, state["counters"].tolist(), strict=True))
            self.reset_interval()
        parts: dict[str, dict[str, Tensor]] = {"rows": {}, "admission": {}}
        for name, value in state.items():
            part, _, name_inside = name.partition("/")
            if name_inside:
                parts[part][name_inside] = value
        if parts["rows"]:
            self._index.import_state(parts["rows"])
            self._store.grow_to(self._index.end)
        if parts["admission"] and self.admission is not None:
            self.admission.import_state(parts["admission"])

    @property
    def nbytes(self) -> int:
        """Bytes in use: rows, times and counts, id map, admission filter; not what is reserved but untouched."""
        rows = self._index.nbytes + self._index.end * self._store.bytes_per_row
        return rows + (0 if self.admission is None else self.admission.nbytes) + self._evicted.nbytes

    def stats(self, *, interval: bool = False) -> dict[str, float]:
        """Return the table's current size, and its counts since start or (interval) since `reset_interval`.

        rows, bytes, bytes_per_row; new: unknown ids in training batches, of which admitted got a row and rejected did
        not; expired: rows given up by age; evicted: rows given up at the limit.
        """
        counters = {name: self._total[name] - interval * self._at_interval[name] for name in COUNTERS}
        rows = len(self)
        return {"rows": rows, "bytes": self.nbytes, "bytes_per_row": self.nbytes / max(1, rows), **counters}

    def reset_interval(self) -> None:
        """Begin a new interval of the statistics."""
        self._at_interval = dict(self._total)

    def _count(self, **more: int) -> None:
        for name, number in more.items():
            self._total[name] += number
