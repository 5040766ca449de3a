"""Read the rows of a set's tables as they were at one moment, in another thread: `snapshot.py` for a set.

All tables share what is kept, so a step saves the rows that it is about to change once, whatever the number of tables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tessera.embedding.record_store import MARK, RecordStore
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.rows_of_tables import RowsOfTable
from tessera.embedding.snapshot import KEPT_ROWS, OPEN, PASSED, SCAN_ROWS
from tessera.kernels import records
from tessera.kernels.chunks import allocate_chunk
from tessera.kernels.gather import gather
from tessera.kernels.scatter import scatter
from tessera.kernels.take_places import take_places
from tessera.kernels.touch import COUNT


class KeptRows:
    """Rows of a set as they were when this was made. One thread changes the set, others read here.

    end: rows given to tables. unused: rows below it that no id has, as numbers and as (begin, end). copies: what one
    before left behind. users: snapshots that read here, of these tables.
    """

    def __init__(
        self, store: RecordStore, end: int, unused: list[Tensor], spans: list[tuple[int, int]], copies: list[Tensor]
    ) -> None:
        self.store, self.chunks = store, list(store.chunks)
        self.users, self.tables = 0, set[int]()
        #: Memory for rows that are kept, from a snapshot before: new memory costs several times the copy of a row.
        self.copies = copies
        self._places = allocate_chunk((end + 1,), torch.int32)
        for rows in unused:
            self._places[rows.cpu()] = PASSED
        for begin, upto in spans:
            self._places[begin:upto] = PASSED
        self._places[end] = PASSED  # stands for rows from `end` on and for row -1
        self._kept = 0
        self._lock = threading.Lock()

    def save_old(self, rows: Tensor) -> None:
        """Copy rows (int64 [n], distinct, -1 skipped) that are about to change."""
        rows = rows.cpu()
        with self._lock:
            rows = take_places(self._places, rows, self._kept)
            if not rows.numel():
                return
            places = torch.arange(self._kept, self._kept + rows.numel())
            self._kept += rows.numel()
            while len(self.copies) * KEPT_ROWS < self._kept:
                self.copies.append(allocate_chunk((KEPT_ROWS, self.store.layout.bytes), torch.uint8))
            stored = records.read(self.chunks, rows.to(self.store.device), self.store.layout)
            scatter(self.copies, places, stored.cpu())

    def read(self, rows: Tensor, begin: int, end: int, *, passing: bool = False) -> tuple[Tensor, Tensor]:
        """Return bytes [begin, end) of rows (int64 [n]) as they were, uint8 [n, bytes] on the host, and their `_places`
        before. passing: they are not read again.

        Training need not wait for this: whatever it changes while the set is read has been kept before, and what is
        kept is put over what was read.
        """
        there = rows.to(self.store.device)
        found = records.read(self.chunks, there, self.store.layout, begin, end - begin).cpu()
        with self._lock:
            places = self._places.index_select(0, rows)
            if passing:
                self._places.index_fill_(0, rows, PASSED)
        kept = (places > OPEN).nonzero().flatten()
        if kept.numel():
            numbers = places[kept].long() - 1
            found[kept] = gather(self.copies, numbers, end - begin, begin=begin)
        return found, places


class TableSnapshot:
    """The part of one table, read by one thread, each row once. Rows are places in the table."""

    def __init__(self, kept: KeptRows, rows: RowsOfTable, released: Callable[[KeptRows], None]) -> None:
        self.kept, self._rows, self._end = kept, rows, rows.end
        self._released: Callable[[KeptRows], None] | None = released
        kept.users += 1

    def release(self) -> None:
        """Say that nobody reads here any more."""
        released, self._released = self._released, None
        if released is not None:
            released(self.kept)

    def rows_in_use(self, since: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the rows in use at that moment, ascending, and their ids: int64 [n] each. since: only those touched
        since a mark."""
        none = torch.empty(0, dtype=torch.int64)
        found = list(self._walk(since))
        return torch.cat([none, *(rows for rows, _ in found)]), torch.cat([none, *(ids for _, ids in found)])

    def _walk(self, since: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(0, self._end, SCAN_ROWS):
            rows = torch.arange(begin, min(begin + SCAN_ROWS, self._end))
            stored, places = self.kept.read(self._numbers(rows), *self.kept.store.meta_span)
            meta = self.kept.store.meta_from(stored)
            chosen = (meta[:, COUNT] > 0) & (places != PASSED)
            if since is not None:
                chosen &= meta[:, MARK] >= since
            chosen = chosen.nonzero().flatten()
            yield rows.index_select(0, chosen), meta[:, 2].index_select(0, chosen)

    def read(self, rows: Tensor) -> RowBatch:
        """Return rows (int64 [n], distinct) as they were; for no rows, empty tensors with the right dtypes."""
        stored, _ = self.kept.read(self._numbers(rows), 0, self.kept.store.layout.bytes, passing=True)
        return self.kept.store.batch_of(stored, rows)

    def _numbers(self, rows: Tensor) -> Tensor:
        return self._rows.numbers(rows.to(self._rows.device)).cpu()
