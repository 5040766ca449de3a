"""Row groups to Arrow record batches, in bounded memory.

Parquet cannot start in the middle of a row group, so a lane that begins there decodes and drops what comes
before; where several lanes begin in one row group (small data sets), it is decoded once for all of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from ctr.data.errors import DataError
from ctr.data.files import one_line
from ctr.data.footers import RowGroups
from ctr.data.lanes import Span, window_step

# Row groups of up to so many windows are decoded at once.
WHOLE_WINDOWS = 2
# Decoded bytes of row groups held for several lanes at once.
SHARED_BYTES = 512 << 20
# Larger compressed row groups are read through a small buffer per column instead of as a whole.
WHOLE_READ_BYTES, READ_BUFFER_BYTES = 64 << 20, 256 << 10


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one row group. Where they cannot be read, batch is None and error says why."""

    group: int
    first_row: int  # inside the row group
    rows: int
    batch: pa.RecordBatch | None
    error: str = ""

    def cut(self, first: int, stop: int) -> Piece:
        """The part between two row numbers of the row group; may have 0 rows."""
        first, stop = max(first, self.first_row), min(stop, self.first_row + self.rows)
        rows = max(0, stop - first)
        batch = self.batch
        if batch is not None and rows != self.rows:
            batch = batch.slice(first - self.first_row, rows)
        return replace(self, first_row=first, rows=rows, batch=batch)


class _Shared:
    def __init__(self, users: int):
        self.users = users
        self.lock = threading.Lock()
        self.pieces: list[Piece] | None = None


class RowGroupReader:
    """Decodes row groups for one rank's lanes, which may read from different threads."""

    def __init__(self, groups: RowGroups, columns: list[str], window_rows: int):
        self.groups = groups
        self.columns = columns
        self.window_rows = window_rows
        self._shared: dict[int, _Shared] = {}

    def share(self, first_groups: list[int]) -> None:
        """Tell with which row group each of the lanes begins, before any of them reads."""
        budget = SHARED_BYTES
        for group, users in Counter(first_groups).items():
            budget -= int(self.groups.bytes[group]) if users > 1 else 0
            if users > 1 and budget >= 0:
                self._shared[group] = _Shared(users)

    def is_whole(self, group: int) -> bool:
        """Whether the row group is decoded at once, and not window by window."""
        return self.groups.rows[group] <= WHOLE_WINDOWS * self.window_rows

    def pieces(self, group: int, begins_lane: bool) -> Iterator[Piece]:
        """The row group from its start, in pieces no larger than a window that end where its windows end."""
        if begins_lane and group in self._shared:
            return iter(self._shared_pieces(group))
        return self._decode(group)

    def _shared_pieces(self, group: int) -> list[Piece]:
        shared = self._shared[group]
        with shared.lock:
            if shared.pieces is None:
                shared.pieces = list(self._decode(group))
            pieces = shared.pieces
            shared.users -= 1
            if not shared.users:  # the last lane to begin; from here on the lanes alone keep it alive
                shared.pieces = None
        return pieces

    def _decode(self, group: int) -> Iterator[Piece]:
        rows, done = int(self.groups.rows[group]), 0
        try:
            with self._open(group) as parquet:
                for batch in self._batches(parquet, group):
                    yield Piece(group, done, batch.num_rows, batch)
                    done += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            self._refuse_unreachable(group)
            yield Piece(group, done, rows - done, None, one_line(error))
            return
        if done != rows:
            error = f"found {done} rows, expected {rows} as the footer says"
            yield Piece(group, done, rows - done, None, error)

    def _batches(self, parquet: pq.ParquetFile, group: int) -> Iterator[pa.RecordBatch]:
        index = int(self.groups.index[group])
        step = window_step(int(self.groups.rows[group]), self.window_rows)
        if not self.is_whole(group):
            yield from parquet.iter_batches(step, row_groups=[index], columns=self.columns, use_threads=False)
            return
        # Quicker than the same in batches, and it leaves no half-read file behind.
        table = parquet.read_row_group(index, columns=self.columns, use_threads=False)
        for first in range(0, table.num_rows, step):
            yield from table.slice(first, step).to_batches()

    def _open(self, group: int) -> pq.ParquetFile:
        file = self.groups.files[self.groups.file[group]]
        large = self.groups.bytes[group] > WHOLE_READ_BYTES
        try:
            return file.open(
                read_dictionary=self.groups.dictionaries,
                pre_buffer=file.remote,  # one request for neighbouring columns instead of one for each
                buffer_size=READ_BUFFER_BYTES if large and not file.remote else 0,
                page_checksum_verification=True,
            )
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.path}: cannot be opened any more: {one_line(error)}") from None

    def _refuse_unreachable(self, group: int) -> None:
        """A page that cannot be decoded is bad data; bytes that cannot be read are no reason to drop rows."""
        file = self.groups.files[self.groups.file[group]]
        try:
            with file.filesystem.open_input_file(file.location) as stored:
                while stored.read(8 << 20):
                    pass
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read: {one_line(error)}") from None


def spans_of(pieces: Iterator[Piece], span: Span) -> Iterator[Piece]:
    """The pieces of a span; `pieces` is left behind the last of them, so that the next span can go on."""
    for piece in pieces:
        part = piece.cut(span.first, span.stop)
        if part.rows:
            yield part
        if piece.first_row + piece.rows >= span.stop:
            return
