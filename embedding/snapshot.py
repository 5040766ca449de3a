"""Read the rows of a table as they were at one moment, in another thread while training goes on.

At the moment itself nothing is copied. Before training changes a row for the first time after it, the table has the
row kept as it was; the reader takes rows that are kept from there, all others from the table. So a moment costs
copies of the rows that change before they have been read, and not of the table.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tessera.embedding.row_batch import RowBatch
from tessera.embedding.row_index import ID, MARK
from tessera.kernels.chunks import allocate_chunk
from tessera.kernels.copy_rows import copy_rows
from tessera.kernels.gather import gather
from tessera.kernels.scatter import scatter
from tessera.kernels.take_places import take_places
from tessera.kernels.touch import COUNT

OPEN, PASSED = 0, -1  # read it from the table; read already, or not in the snapshot. Else 1 + place among kept rows
KEPT_ROWS = 1 << 14  # rows of a chunk of kept rows
SCAN_ROWS = 1 << 16


class Snapshot:
    """Made by `DynamicTable.snapshot`. One thread changes the table, one reads here, each row once.

    chunks: of the rows' times, counts and ids, then of each group of columns. free: rows below `end` not in use.
    batch_of: what `RowBatch` is made of rows as they lie in chunks. copies: what a snapshot before left behind.
    released: called by `release`. What is read is in host memory.
    """

    def __init__(
        self,
        chunks: Sequence[list[Tensor]],
        end: int,
        free: Tensor,
        batch_of: Callable[[Tensor, list[Tensor]], RowBatch],
        copies: list[list[Tensor]],
        released: Callable[[Snapshot], None],
    ) -> None:
        self._released = released
        self._end, self._batch_of = end, batch_of
        self._chunks = [list(group) for group in chunks]
        #: Memory for rows that are kept, from a snapshot before: new memory costs several times the copy of a row.
        self.copies = copies or [[] for _ in chunks]
        self._places = allocate_chunk((end + 1,), torch.int32)
        self._places[free.cpu()] = PASSED
        self._places[end] = PASSED  # stands for rows from `end` on and for row -1
        self._kept = 0
        self._lock = threading.Lock()

    def release(self) -> None:
        """Say that nobody reads here any more."""
        self._released(self)

    def save_old(self, rows: Tensor) -> None:
        """Copy rows (int64 [n], distinct, -1 skipped) that are about to change."""
        rows = rows.cpu()
        with self._lock:
            rows = take_places(self._places, rows, self._kept)
            if not rows.numel():
                return
            places = torch.arange(self._kept, self._kept + rows.numel())
            self._kept += rows.numel()
            for copies, chunks in zip(self.copies, self._chunks, strict=True):
                while len(copies) * KEPT_ROWS < self._kept:
                    copies.append(allocate_chunk((KEPT_ROWS, chunks[0].shape[1]), chunks[0].dtype))
                if chunks[0].device.type == "cpu":
                    copy_rows(chunks, rows, copies, places)
                else:
                    scatter(copies, places, gather(chunks, rows.to(chunks[0].device), chunks[0].shape[1]).cpu())

    def rows_in_use(self, since: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the rows in use at that moment, ascending, and their ids: int64 [n] each. since: only those touched
        since a mark."""
        all_rows, all_ids = torch.empty((2, self._end), dtype=torch.int64)
        count = 0
        for rows, ids in self._walk(since):
            all_rows[count : count + rows.numel()] = rows
            all_ids[count : count + rows.numel()] = ids
            count += rows.numel()
        return all_rows[:count], all_ids[:count]

    def _walk(self, since: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(0, self._end, SCAN_ROWS):
            rows = torch.arange(begin, min(begin + SCAN_ROWS, self._end))
            (meta,), places = self._read(rows, 1)
            chosen = (meta[:, COUNT] > 0) & (places != PASSED)
            if since is not None:
                chosen &= meta[:, MARK] >= since
            chosen = chosen.nonzero().flatten()
            yield rows.index_select(0, chosen), meta[:, ID].index_select(0, chosen)

    def read(self, rows: Tensor) -> RowBatch:
        """Return rows (int64 [n], distinct) as they were; for no rows, empty tensors with the right dtypes."""
        return self._batch_of(rows, self._read(rows, len(self._chunks), passing=True)[0])

    def _read(self, rows: Tensor, groups: int, *, passing: bool = False) -> tuple[list[Tensor], Tensor]:
        """Return rows of the first `groups` chunk lists, and their `_places` before. passing: they are not read again.

        Training need not wait for this: whatever it changes while the table is read has been kept before, and what is
        kept is put over what was read.
        """
        found = self._read_open(rows, groups)
        with self._lock:
            places = self._places.index_select(0, rows)
            if passing:
                self._places.index_fill_(0, rows, PASSED)
        kept = (places > OPEN).nonzero().flatten()
        if kept.numel():
            numbers = places[kept].long() - 1
            for part, copies in zip(found, self.copies, strict=False):
                part[kept] = gather(copies, numbers, part.shape[1])
        return found, places

    def _read_open(self, rows: Tensor, groups: int | None = None) -> list[Tensor]:
        """Return one tensor [n, width of the chunks] per chunk list."""
        if not rows.numel():
            return [chunks[0][:0].cpu() for chunks in self._chunks[:groups]]
        there = rows.to(self._chunks[0][0].device)
        return [gather(chunks, there, chunks[0].shape[1]).cpu() for chunks in self._chunks[:groups]]


class Snapshots:
    """The snapshots of one table that are being read."""

    def __init__(self) -> None:
        self._all: list[Snapshot] = []
        self._change = threading.Lock()  # they are released by the threads that read them
        self._spare: list[list[Tensor]] = []

    def __len__(self) -> int:
        """Return how many are being read."""
        return len(self._all)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._all)  # a list is replaced, never changed

    def add(
        self,
        chunks: Sequence[list[Tensor]],
        end: int,
        free: Tensor,
        batch_of: Callable[[Tensor, list[Tensor]], RowBatch],
    ) -> Snapshot:
        """Return a new one; arguments as for `Snapshot`."""
        with self._change:
            copies, self._spare = self._spare, []
            snapshot = Snapshot(chunks, end, free, batch_of, copies, self._release)
            self._all = [*self._all, snapshot]
        return snapshot

    def _release(self, snapshot: Snapshot) -> None:
        """Forget a snapshot that nobody reads any more. Its memory is reused by the next one."""
        with self._change:
            if any(other is snapshot for other in self._all):
                self._all = [other for other in self._all if other is not snapshot]
                self._spare = snapshot.copies

    def save_old(self, rows: Tensor) -> None:
        """Copy rows that are about to change into the snapshots."""
        for snapshot in self._all:
            snapshot.save_old(rows)
