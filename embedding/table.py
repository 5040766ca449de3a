"""A table that gives every id a row of its own, on one rank. The methods follow the life of a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embedding.config import DynamicTableConfig
from embedding.row_index import COUNT, ID, LAST_SEEN, RowIndex
from embedding.row_store import RowStore

COUNTERS = ("new", "admitted", "rejected", "expired", "evicted")


@dataclass
class RowBatch:
    """Rows on their way out of a table or into one.

    ids, last_seen (seconds), count: int64 [n]; values: float32 [n, width]; state: float32 [n, state_width], the state
    of one group after the other. rows: int64 [n], the row numbers they had, or None.
    """

    ids: Tensor
    values: Tensor
    state: Tensor
    last_seen: Tensor
    count: Tensor
    rows: Tensor | None = None


class DynamicTable:
    def __init__(self, config: DynamicTableConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._index = RowIndex(config.chunk_rows, device)
        self._store = RowStore(config, device)
        self._mark = 1
        self._total = dict.fromkeys(COUNTERS, 0)
        self._at_interval = dict(self._total)

    def __len__(self) -> int:
        """Rows in use."""
        return len(self._index)

    def lookup(
        self, ids: Tensor, now: int | Tensor, counts: Tensor | None = None, training: bool = True
    ) -> Tensor:
        """The rows of a batch's ids: int64 [u], -1 for an id that has none.

        ids: int64 [u], distinct; now: seconds, one number or int64 [u]; counts: int64 [u], how often each id is in
        the batch, 1 or more (None: once). In training an unknown id is counted by the admission filter and gets a row
        if it passes, and all rows are touched. Otherwise nothing changes: `now` and `counts` are not used.
        """
        rows = self._index.find(ids)
        if not training:
            return rows
        unknown = (rows < 0).nonzero().flatten()
        if unknown.numel():
            new_ids = ids[unknown]
            self._count(new=new_ids.numel(), admitted=new_ids.numel())
            rows[unknown] = self._add(new_ids)
        self._index.touch(rows, now, counts)
        return rows

    def _add(self, ids: Tensor) -> Tensor:
        rows = self._index.add(ids, self._mark)
        self._store.reserve(self._index.end)
        self._store.initialise(rows, ids)
        return rows

    def gather(self, rows: Tensor, inverse: Tensor | None = None) -> Tensor:
        """Values of rows, all groups side by side: float32 [u, width], or [n, width] with inverse int64 [n].

        Row -1 gives zeros.
        """
        return self._store.gather(rows, inverse)

    def update(
        self, rows: Tensor, grads: Tensor, inverse: Tensor | None = None, lr: float | None = None
    ) -> None:
        """One optimizer step on the rows of a batch.

        rows: int64 [u], distinct but for -1, which is skipped; grads: float32 [n, width], where n == u, or
        inverse: int64 [n] names the place in `rows` that each gradient belongs to (they are summed in order);
        lr: instead of the configured learning rate.
        """
        self._store.update(rows, grads, inverse, lr)
        self._index.set_mark(rows, self._mark)

    def export_rows(self, batch_rows: int = 1 << 16) -> Iterator[RowBatch]:
        """All rows in order of their numbers, at most `batch_rows` at once. The table must not change meanwhile."""
        for rows, meta in self._index.walk(batch_rows):
            yield RowBatch(
                ids=meta[:, ID].contiguous(),
                values=self._store.gather(rows),
                state=self._store.read_state(rows),
                last_seen=meta[:, LAST_SEEN].contiguous(),
                count=meta[:, COUNT].contiguous(),
                rows=rows,
            )

    def import_rows(self, batch: RowBatch) -> None:
        """Take rows in as they are; an id that is known already is replaced. batch.ids must be distinct."""
        rows = self._index.find(batch.ids)
        unknown = (rows < 0).nonzero().flatten()
        if unknown.numel():
            rows[unknown] = self._index.add(batch.ids[unknown], self._mark)
            self._store.reserve(self._index.end)
        self._index.write(rows, batch.last_seen, batch.count, batch.ids, self._mark)
        self._store.write(rows, batch.values, batch.state)

    @property
    def nbytes(self) -> int:
        """Bytes in use: rows, their times and counts, the id map."""
        return self._index.nbytes + self._index.end * self._store.bytes_per_row

    def stats(self, interval: bool = False) -> dict[str, float]:
        """rows, bytes, bytes_per_row now; new (= admitted + rejected), expired, evicted since start or interval."""
        counters = {name: self._total[name] - interval * self._at_interval[name] for name in COUNTERS}
        rows = len(self)
        return {"rows": rows, "bytes": self.nbytes, "bytes_per_row": self.nbytes / max(1, rows), **counters}

    def reset_interval(self) -> None:
        """Begin a new interval of the statistics."""
        self._at_interval = dict(self._total)

    def _count(self, **more: int) -> None:
        for name, number in more.items():
            self._total[name] += number
