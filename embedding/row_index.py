"""Track which id each row belongs to, when it was added and last seen, and how often.

An `IdMap` leads from an id to its row. Beside the rows lie chunks of int64 [chunk_rows, 4]: time last seen, count
(0: the row is free), id, and the mark under which the row last changed; where it is asked for, a fifth column has the
period in which the row was added. Rows are numbered from 0; a freed row is
taken again before a new one, the last freed first, so the same calls always give the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera.embedding.free_rows import FreeRows
from tessera.kernels.chunks import allocate_chunk, first_rows, touch_pages
from tessera.kernels.gather import gather
from tessera.kernels.id_map import IdMap
from tessera.kernels.scatter import scatter, scatter_columns
from tessera.kernels.touch import COUNT, expired, touch

ID, MARK, PERIOD = 2, 3, 4
COLUMNS = 4  # without the period
SCAN_ROWS = 1 << 18  # rows looked at in one piece, which bounds the temporary memory of a walk


class RowIndex:
    def __init__(self, chunk_rows: int, device: torch.device | str = "cpu", *, with_periods: bool = False) -> None:
        self.device = torch.device(device)
        self.map = IdMap(device)
        self.meta: list[Tensor] = []
        self.end = 0  # rows ever taken: all rows in use are below
        self._chunk_rows = chunk_rows
        self._columns = COLUMNS + with_periods
        self._free = FreeRows(device)
        self._cursor = 0

    def __len__(self) -> int:
        return len(self.map)

    @property
    def nbytes(self) -> int:
        """Bytes in use; what is reserved beyond `end` has not been touched."""
        return self.map.nbytes + self.end * self._columns * 8 + self._free.nbytes

    def find(self, ids: Tensor) -> Tensor:
        """Return rows int64 [n] of ids int64 [n]; -1 where unknown."""
        return self.map.find(ids)

    def add(self, ids: Tensor, mark: int, period: int = 0) -> Tensor:
        """Give rows to distinct, unknown ids. Their time and count are left to `touch`. Returns rows int64 [n].

        Raises torch.OutOfMemoryError where a GPU has no memory for them; then none of the ids has a row.
        """
        rows = self._take_rows(ids.numel())
        try:
            self.map.insert(ids, rows)
        except torch.OutOfMemoryError:
            self.map.erase(ids)
            self._free.give_back(rows.flip(0))
            raise
        self.write(rows, 0, 0, ids, mark, period)
        return rows

    def remove(self, rows: Tensor) -> Tensor:
        """Free rows in use (int64 [n], distinct). Returns their ids."""
        if rows.numel() == 0:
            return rows
        ids = gather(self.meta, rows, 1, begin=ID).flatten()
        self.map.erase(ids)
        scatter(self.meta, rows, rows.new_zeros((1, self._columns)))
        self._free.give_back(rows)
        return ids

    def touch(self, rows: Tensor, now: int | Tensor, counts: Tensor | None) -> None:
        """Record that rows (distinct, -1 skipped) were seen at `now`, each counts[i] times (None: once)."""
        touch(self.meta, rows, now, counts)

    def set_mark(self, rows: Tensor, mark: int) -> None:
        """Note that rows (-1 skipped) changed under this mark."""
        scatter(self.meta, rows, torch.full((1, 1), mark, dtype=torch.int64, device=self.device), begin=MARK)

    def read(self, rows: Tensor) -> Tensor:
        """Return int64 [n, 4]: time, count, id, mark of rows; [n, 5] with the period."""
        return gather(self.meta, rows, self._columns)

    def counts_of(self, rows: Tensor) -> Tensor:
        """Return how often rows were seen: int64 [n]."""
        return gather(self.meta, rows, 1, begin=COUNT).flatten()

    def write(
        self,
        rows: Tensor,
        last_seen: Tensor | int,
        count: Tensor | int,
        ids: Tensor,
        mark: int,
        period: Tensor | int = 0,
    ) -> None:
        """Set time, count, id, mark and period of rows that have been taken (tensors int64 [n])."""
        known = (last_seen, count, ids, mark, period)[: self._columns]
        parts = [self._column(number) for number in known]
        scatter_columns(self.meta, rows, parts)

    def _column(self, numbers: Tensor | int) -> Tensor:
        """Return [n, 1], or [1, 1] of one number for all rows."""
        if isinstance(numbers, Tensor):
            return numbers[:, None]
        return torch.full((1, 1), numbers, dtype=torch.int64, device=self.device)

    def expired(self, now: int, ttl: int, budget_rows: int | None = None) -> Iterator[Tensor]:
        """Yield rows with now - last seen >= ttl, piece by piece, from where the last walk stopped.

        Looks at `budget_rows` rows (None: at all). The caller may remove what it is given before it goes on.
        """
        left = self.end if budget_rows is None else min(budget_rows, self.end)
        while left > 0:
            if self._cursor >= self.end:
                self._cursor = 0
            begin = self._cursor
            self._cursor = min(begin + min(left, SCAN_ROWS), self.end)
            left -= self._cursor - begin
            yield expired(self.meta, now, ttl, begin, self._cursor)

    @property
    def free(self) -> Tensor:
        """Rows below `end` that are not in use: int64 [k]."""
        return self._free.rows

    def numbers(self, places: Tensor) -> Tensor:
        """Return the numbers of the rows taken as the n-th: the same."""
        return places

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, `read` of it and those after it: int64 [k, 4 or 5]) for all rows ever taken."""
        for begin, chunk in zip(range(0, self.end, self._chunk_rows), self.meta, strict=False):
            yield begin, chunk[: self.end - begin]

    def walk(self, batch_rows: int, since: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows int64 [k], what `read` gives of them) of rows in use, ascending, at most `batch_rows` at once.

        since: only rows that changed under this mark or a later one.
        """
        for begin in range(0, self.end, batch_rows):
            rows = torch.arange(begin, min(begin + batch_rows, self.end), device=self.device)
            meta = self.read(rows)
            chosen = meta[:, COUNT] > 0
            if since is not None:
                chosen &= meta[:, MARK] >= since
            chosen = chosen.nonzero().flatten()
            if chosen.numel():
                yield rows[chosen], meta[chosen]

    def grow_to(self, end: int) -> None:
        """Provide memory for rows [0, end), the new ones free. Memory beyond is not touched."""
        self._add_chunks(end)
        begin, self.end = self.end, max(self.end, end)
        while begin < end:
            chunk, row = divmod(begin, self._chunk_rows)
            self.meta[chunk][row : row + end - begin] = 0
            begin = (chunk + 1) * self._chunk_rows

    def _add_chunks(self, end: int) -> None:
        while len(self.meta) * self._chunk_rows < end:
            self.meta.append(allocate_chunk((self._chunk_rows, self._columns), torch.int64, self.device))

    def reserve(self, rows: int) -> None:
        """Reserve and touch memory for so many rows, still to be taken, and their ids. No row must have been taken."""
        assert self.end == 0, self.end
        self.map.reserve(rows)
        self._add_chunks(rows)
        touch_pages(first_rows(self.meta, rows))

    def place(self, ids: Tensor, rows: Tensor) -> None:
        """Give distinct, unknown ids the rows they had in the index whose state is imported."""
        if rows.numel():
            self.grow_to(int(rows.max()) + 1)
        self.map.insert(ids, rows)

    def export_state(self) -> dict[str, Tensor]:
        """Return the state that decides which rows are taken and scanned next: free int64 [k], end and cursor int64
        []."""
        return {"free": self.free.clone(), "end": torch.tensor(self.end), "cursor": torch.tensor(self._cursor)}

    def import_state(self, state: dict[str, Tensor]) -> None:
        self.grow_to(int(state["end"]))
        self._free.replace(state["free"])
        self._cursor = int(state["cursor"])

    def end_with(self, wanted: int) -> int:
        """Return what `end` will be when `wanted` more rows are taken."""
        return self.end + max(0, wanted - len(self._free))

    def _take_rows(self, wanted: int) -> Tensor:
        self._add_chunks(self.end_with(wanted))
        rows = self._free.take(wanted)
        if rows.numel() < wanted:
            begin = self.end
            self.grow_to(begin + wanted - rows.numel())
            rows = torch.cat([rows, torch.arange(begin, self.end, device=self.device)])
        return rows
