"""A table in host memory with some of its rows on a device: what `DynamicTable` is, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.embedding.alpt import TwoPassUpdate
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.row_cache import COUNTERS, CachedRows, RowCache
from tessera.embedding.snapshot import Snapshot
from tessera.embedding.table import DynamicTable


def make_table(config: DynamicTableConfig, device: torch.device | str) -> DynamicTable:
    """Return a table on the device, or one on the host with a cache there if the configuration has one."""
    return DynamicTable(config, device) if config.cache_limit is None else CachedTable(config, device)


class CachedTable(DynamicTable):
    """Training goes through `bring`; all else reads and writes the host's rows, after what changed was written back.

    A batch may be brought while the one before it is trained, but nothing else may be asked of the table between:
    the host knows already what the coming batch has inserted, counted, touched and evicted. Tensors that go in and out
    live on the host but for those of `bring`.

    Attributes:
        cache: the rows on the device.
        prefetched: set by whoever prefetches batches: how many of them no step has begun with.
    """

    def __init__(self, config: DynamicTableConfig, device: torch.device | str) -> None:
        super().__init__(config, "cpu")
        if self._store.decay is not None:
            self._store.decay.ahead = True
        self.cache = RowCache(config, self._store, device)
        self.prefetched = 0
        self._cache_at_interval = dict(self.cache.total)

    def bring(self, ids: Tensor, now: int | Tensor, counts: Tensor | None = None) -> tuple[CachedRows, Tensor]:
        """Look up as in training, and copy the rows of the batch to the device, ahead of its step or in it.

        ids, counts: on any device, as for `lookup`. Returns what stands for the table in the step of this batch, and
        slots int64 [u] on the device, -1 for an id that has no row. Raises TableFull, and CacheFull if the rows of this
        batch and the one before do not fit the cache.
        """
        ids, counts = ids.cpu(), None if counts is None else counts.cpu()
        now = now.cpu() if isinstance(now, Tensor) else now
        rows = super().lookup(ids, now, counts)
        if self._mark:
            self._index.set_mark(rows, self._mark)
        slots, old = self.cache.bring(rows), self._old(rows)
        old = None if old is None else old.to(self.cache.device)
        counts = self._index.counts_of(rows).to(self.cache.device) if self.config.decay_floats == 2 else None
        return CachedRows(self.cache, self._step, old, counts), slots.to(self.cache.device)

    def pass_step(self, lr: float) -> None:
        """Let a step pass that trains no row, for the decay of all."""
        self._store.pass_step(torch.empty(0, dtype=torch.int64), lr, self._index.counts_of)

    def _free(self, rows: Tensor) -> None:
        self.cache.drop(rows)
        super()._free(rows)

    def _settle(self) -> None:
        """Write back the cache, so that the host has what an uncached table would have."""
        self._assert_alone()
        self.cache.flush()

    def _assert_alone(self) -> None:
        assert self.prefetched == 0, f"table {self.config.name}: asked while the batch of a later step is prefetched"

    def lookup(self, ids: Tensor, now: int | Tensor, counts: Tensor | None = None, *, training: bool = True) -> Tensor:
        self._assert_alone()
        return super().lookup(ids, now, counts, training=training)

    def gather(self, rows: Tensor, inverse: Tensor | None = None) -> Tensor:
        self._settle()
        return super().gather(rows, inverse)

    def update(
        self,
        rows: Tensor,
        grads: Tensor,
        inverse: Tensor | None = None,
        lr: float | None = None,
        ids: Tensor | None = None,
    ) -> None:
        self._replace(rows)
        super().update(rows, grads, inverse, lr, ids)

    def begin_update(
        self,
        rows: Tensor,
        grads: Tensor,
        inverse: Tensor | None = None,
        lr: float | None = None,
        ids: Tensor | None = None,
    ) -> TwoPassUpdate:
        self._replace(rows)
        return super().begin_update(rows, grads, inverse, lr, ids)

    def _replace(self, rows: Tensor) -> None:
        """Prepare for a change of rows on the host: write back the cache and drop them from it."""
        self._settle()
        self.cache.end_step()
        self.cache.drop(rows[rows >= 0])

    def expire(self, now: int, budget_rows: int | None = None) -> int:
        self._assert_alone()
        self.cache.end_step()
        return super().expire(now, budget_rows)

    def _read(self, rows: Tensor, meta: Tensor) -> RowBatch:
        self._settle()
        return super()._read(rows, meta)

    def snapshot(self) -> Snapshot:
        # Later write-backs are of batches brought later, whose rows `lookup` has copied to the snapshot before.
        self._settle()
        return super().snapshot()

    def begin_period(self) -> None:
        self._assert_alone()
        super().begin_period()

    def import_rows(self, batch: RowBatch) -> None:
        self._replace(self._index.find(batch.ids))
        super().import_rows(batch)

    def export_state(self) -> dict[str, Tensor]:
        self._assert_alone()
        return super().export_state()

    def import_state(self, state: dict[str, Tensor]) -> None:
        self._assert_alone()
        super().import_state(state)

    def mark(self) -> int:
        self._assert_alone()
        return super().mark()

    def cache_stats(self, total: dict[str, int] | None = None) -> dict[str, int]:
        """Return counts since the last call: rows of batches that were there (hits) or fetched (misses), and rows
        written back.

        total: what `cache.total` was at some moment since the last call; None: up to now.
        """
        total, before = dict(total or self.cache.total), self._cache_at_interval
        self._cache_at_interval = total
        return {name: total[name] - before[name] for name in COUNTERS}
