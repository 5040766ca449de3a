"""The memory of a set's records: chunks that grow, and what their bytes mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tessera.embedding import growth
from tessera.embedding.config import PERIOD_BYTES, DynamicTableConfig
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.row_store import RowStore
from tessera.kernels import records
from tessera.kernels.chunks import allocate_chunk, touch_pages
from tessera.kernels.layout import plain_layout
from tessera.kernels.record_layout import COUNT, ID, LAST_SEEN, META_BYTES, TABLE, is_plain, record_layout

MARK, PERIOD = 3, 4  # columns of what `RecordStore.meta` gives, beside LAST_SEEN, COUNT and ID
_TABLE_BITS = (1 << 32) - 1


class RecordStore:
    """Row numbers are the set's; -1 is skipped, and reads zeros.

    config: of any table of the set; None: only time, count, id and table of a record are of use (ops want one value,
    and it is there).

    Attributes:
        layout: of a record. chunks: of records. with_periods: whether rows keep the period in which they were added.
        decay_floats: numbers by which rows know how far they are decayed.
    """

    def __init__(self, config: DynamicTableConfig | None, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.with_periods = config is not None and config.knows_periods
        self.layout = record_layout([plain_layout(1, "sgd")]) if config is None else config.record
        self.decay_floats = 0 if config is None else config.decay_floats
        self.chunks: list[Tensor] = []
        self.reserved = 0  # rows
        # Holds no rows: it knows what a group's bytes mean.
        self._codec = None if config is None else RowStore(config, device)
        self._first = self.layout.meta_at - PERIOD_BYTES * self.with_periods  # of what `meta` gives

    def grow_to(self, end: int, *, limited: bool = True) -> None:
        """Provide memory for rows [0, end). limited: leave the GPU the reserve that `growth` keeps for the tower.

        Raises torch.OutOfMemoryError where a GPU has none for them; what was there is as it was.
        """
        if limited:
            growth.check_room(self.device, self.bytes_to_grow(end))
        while self.reserved < end:
            rows = records.chunk_rows(self.reserved)
            self.chunks.append(allocate_chunk((rows, self.layout.bytes), torch.uint8, self.device))
            self.reserved += rows

    def bytes_to_grow(self, end: int) -> int:
        """Return the bytes that `grow_to` will take."""
        reserved = self.reserved
        while reserved < end:
            reserved += records.chunk_rows(reserved)
        return (reserved - self.reserved) * self.layout.bytes

    def touch_pages(self, spans: list[tuple[int, int]]) -> None:
        """Commit the memory of rows [begin, end) of each span, none of which was written."""
        touch_pages([part for begin, end in spans for _, part in self._slices(begin, end)])

    def _slices(self, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, records uint8 [k, bytes] in place) for rows [begin, end)."""
        first = 0
        for chunk in self.chunks:
            low, high = max(begin, first), min(end, first + len(chunk))
            if low < high:
                yield low, chunk[low - first : high - first]
            first += len(chunk)

    def meta_of(self, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, time, count and id int64 [k, 3 or more] in place) for rows [begin, end)."""
        at = self.layout.meta_at // 8
        for row, part in self._slices(begin, end):
            yield row, part.view(torch.int64)[:, at : at + META_BYTES // 8]

    def meta(self, rows: Tensor) -> Tensor:
        """Return time, count, id and mark of rows, and the period where it is kept: int64 [n, 4 or 5]."""
        return self.meta_from(records.read(self.chunks, rows, self.layout, self._first, self._meta_bytes))

    @property
    def meta_span(self) -> tuple[int, int]:
        """Where the bytes lie that `meta_from` takes."""
        return self._first, self._first + self._meta_bytes

    @property
    def _meta_bytes(self) -> int:
        return META_BYTES + self.layout.meta_at - self._first

    def meta_from(self, stored: Tensor) -> Tensor:
        """Return what `meta` does, from those bytes of records, uint8 [n, bytes]."""
        words = _copied(stored).view(torch.int64).reshape(len(stored), self._meta_bytes // 8)
        if self.with_periods:
            words = words.roll(-1, 1)
        words[:, MARK] >>= 32
        return words

    def ids_of(self, rows: Tensor) -> Tensor:
        """Return the id of each row: int64 [n]."""
        stored = records.read(self.chunks, rows, self.layout, self.layout.meta_at + 8 * ID, 8)
        return stored.view(torch.int64).flatten()

    def tables_of(self, rows: Tensor) -> Tensor:
        """Return the table of each row: int64 [n]."""
        stored = records.read(self.chunks, rows, self.layout, self.layout.meta_at + 8 * TABLE, 8)
        return stored.view(torch.int64).flatten() & _TABLE_BITS

    def periods_of(self, rows: Tensor) -> Tensor:
        """Return the period in which each row was added: int64 [n]."""
        return records.read(self.chunks, rows, self.layout, self._first, PERIOD_BYTES).view(torch.int64).flatten()

    def set_periods(self, rows: Tensor, periods: Tensor) -> None:
        """Set the periods (int64 [n]) of rows."""
        records.write(self.chunks, rows, _bytes_of(periods), self.layout, self._first)

    def decay_of(self, rows: Tensor) -> Tensor:
        """Return how far each row is decayed, as `decay.py` says: float64 [n, decay_floats]."""
        begin, end = self._decay_span
        return _float64(records.read(self.chunks, rows, self.layout, begin, end - begin))

    def set_decay(self, rows: Tensor, noted: Tensor) -> None:
        """Note how far rows are decayed: float64 [n, decay_floats]."""
        records.write(self.chunks, rows, _bytes_of_rows(noted), self.layout, self._decay_span[0])

    @property
    def _decay_span(self) -> tuple[int, int]:
        return self.layout.decay_at, self.layout.decay_at + 8 * self.decay_floats

    def set_marks(self, rows: Tensor, tables: Tensor, mark: int) -> None:
        """Note that rows changed under this mark. tables: int64 [n], of each row, or [1], of all."""
        words = tables | (mark << 32)
        records.write(self.chunks, rows, _bytes_of(words), self.layout, self.layout.meta_at + 8 * TABLE)

    def clear(self, rows: Tensor) -> None:
        """Set rows to zero: no id has them."""
        none = torch.zeros((1, self.layout.bytes), dtype=torch.uint8, device=self.device)
        records.write(self.chunks, rows, none, self.layout)

    def read(self, rows: Tensor) -> Tensor:
        """Return records as they lie in memory: uint8 [n, bytes]."""
        return records.read(self.chunks, rows, self.layout)

    def batch_of(self, stored: Tensor, places: Tensor) -> RowBatch:
        """Return a batch of records as they lie in memory, uint8 [n, bytes], on any device. places: int64 [n]."""
        begin, end = self.meta_span
        meta = self.meta_from(stored[:, begin:end])
        assert self._codec is not None
        values, state, scales = self._codec.decode(self.groups_of(stored))
        ids, last_seen, count = (meta[:, column].contiguous() for column in (ID, LAST_SEEN, COUNT))
        period = meta[:, PERIOD].contiguous() if self.with_periods else None
        begin, end = self._decay_span
        decay = _float64(stored[:, begin:end]) if self.decay_floats else None
        return RowBatch(ids, values, state, last_seen, count, rows=places, scale=scales, period=period, decay=decay)

    def groups_of(self, stored: Tensor) -> list[Tensor]:
        """Return what a `RowStore` holds of each group, from records uint8 [n, bytes]."""
        found = []
        for group, begin in zip(self.layout.groups, self.layout.begins, strict=True):
            if not is_plain(group):
                found.append(stored[:, begin : begin + group.bytes])
                continue
            values = stored[:, group.values_at : group.values_at + 4 * group.dim]
            state = stored[:, group.state_at : group.state_at + 4 * group.state_floats]
            both = torch.cat([values, state], dim=1).view(torch.float32)
            found.append(both.reshape(len(stored), group.dim + group.state_floats))
        return found

    def write_groups(self, rows: Tensor, parts: list[Tensor]) -> None:
        """Overwrite values, state and scales of rows with what a `RowStore` holds of them. The rest stays."""
        for group, begin, part in zip(self.layout.groups, self.layout.begins, parts, strict=True):
            if not is_plain(group):
                records.write(self.chunks, rows, part, self.layout, begin)
                continue
            values, state = part[:, : group.dim], part[:, group.dim :]
            records.write(self.chunks, rows, _bytes_of_rows(values), self.layout, group.values_at)
            if group.state_floats:
                records.write(self.chunks, rows, _bytes_of_rows(state), self.layout, group.state_at)

    def write(self, rows: Tensor, parts: list[Tensor], batch: RowBatch, word: int, period: int) -> None:
        """Overwrite rows, whole. parts: what `stored_of` gives of the batch; word: table and mark; period: of rows that
        have none."""
        words = [batch.last_seen, batch.count, batch.ids, torch.full_like(rows, word)]
        if self.with_periods:
            words.insert(0, torch.full_like(rows, period) if batch.period is None else batch.period)
        self.write_groups(rows, parts)
        records.write(self.chunks, rows, _bytes_of_rows(torch.stack(words, 1)), self.layout, self._first)
        if batch.decay is not None:
            self.set_decay(rows, batch.decay)

    def stored_of(self, batch: RowBatch, config: DynamicTableConfig) -> list[Tensor]:
        """Return what a `RowStore` holds of a batch. Raises ValueError for other shapes or dtypes."""
        store = self.store_for(batch.ids.numel(), config)
        places = torch.arange(batch.ids.numel(), device=self.device)
        store.write(places, batch.values, batch.state, batch.scale)
        return store.stored(places)

    def store_for(self, rows: int, config: DynamicTableConfig) -> RowStore:
        """Return a store of its own for so many rows of a table."""
        store = RowStore(replace(config, chunk_rows=1 << max(0, rows - 1).bit_length()), self.device)
        store.grow_to(max(1, rows))
        return store


def _float64(stored: Tensor) -> Tensor:
    """Return uint8 [n, 8 k] as float64 [n, k]."""
    return _copied(stored).view(torch.float64).reshape(len(stored), stored.shape[1] // 8)


def _bytes_of(words: Tensor) -> Tensor:
    """Return int64 [n] as uint8 [n, 8]."""
    return words.contiguous().view(torch.uint8).view(-1, 8)


def _bytes_of_rows(matrix: Tensor) -> Tensor:
    """Return a matrix [n, k] as uint8 [n, bytes of a row]."""
    return _copied(matrix).view(torch.uint8).reshape(len(matrix), matrix.shape[1] * matrix.element_size())


def _copied(columns: Tensor) -> Tensor:
    """Return a copy with no gaps. `contiguous` would copy nothing of a single row, wherever it begins."""
    return columns.clone(memory_format=torch.contiguous_format)
