"""Row groups to Arrow record batches, one lane at a time, in bounded memory.

A lane reads its rows in order. Parquet cannot start in the middle of a row group, so a lane that begins there
decodes and drops what comes before; where several lanes begin in one row group (small data sets), the group
is decoded once for all of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr.data.errors import DataError
from ctr.data.files import one_line
from ctr.data.footers import RowGroups

# A constant and not the window: rows before a corrupt page are delivered in steps of this size, and which
# rows those are must not depend on settings.
DECODE_ROWS = 32768
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
    """Decodes the row groups of one epoch for one rank's lanes, which may read from different threads."""

    def __init__(self, groups: RowGroups, columns: list[str], order: np.ndarray):
        """order: the permuted row groups, int64 [groups]."""
        self.groups = groups
        self.columns = columns
        self.order = order
        self.ends = np.cumsum(groups.rows[order])
        self._shared: dict[int, _Shared] = {}

    def share(self, starts: list[int]) -> None:
        """Tell at which rows of the epoch's order the lanes begin, before any of them reads."""
        begun = Counter(int(self.order[self._place(start)]) for start in starts)
        budget = SHARED_BYTES
        for group, users in begun.items():
            budget -= int(self.groups.bytes[group]) if users > 1 else 0
            if users > 1 and budget >= 0:
                self._shared[group] = _Shared(users)

    def lane(self, start: int, stop: int) -> Iterator[Piece]:
        """The rows [start, stop) of the epoch's order."""
        shared = True  # only a lane's first row group can be shared
        while start < stop:
            place = self._place(start)
            group = int(self.order[place])
            begin = int(self.ends[place] - self.groups.rows[group])
            first, last = start - begin, min(stop, int(self.ends[place])) - begin
            pieces = self._shared_pieces(group) if shared and group in self._shared else self._decode(group)
            for piece in pieces:
                cut = piece.cut(first, last)
                if cut.rows:
                    yield cut
                if piece.first_row + piece.rows >= last:
                    break
            start, shared = begin + last, False

    def _place(self, row: int) -> int:
        return int(np.searchsorted(self.ends, row, side="right"))

    def _shared_pieces(self, group: int) -> Iterator[Piece]:
        shared = self._shared[group]
        with shared.lock:
            if shared.pieces is None:
                shared.pieces = list(self._decode(group))
            pieces = shared.pieces
            shared.users -= 1
            if not shared.users:  # the last lane to begin; from here on the lanes alone keep it alive
                shared.pieces = None
        yield from pieces

    def _decode(self, group: int) -> Iterator[Piece]:
        rows, done = int(self.groups.rows[group]), 0
        index = int(self.groups.index[group])
        try:
            with self._open(group) as parquet:
                batches = parquet.iter_batches(
                    DECODE_ROWS, row_groups=[index], columns=self.columns, use_threads=False
                )
                for batch in batches:
                    yield Piece(group, done, batch.num_rows, batch)
                    done += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            self._refuse_unreachable(group)
            yield Piece(group, done, rows - done, None, one_line(error))
            return
        if done != rows:
            error = f"found {done} rows, expected {rows} as the footer says"
            yield Piece(group, done, rows - done, None, error)

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


def take_rows(pieces: Iterator[Piece], rest: list[Piece], rows: int) -> list[Piece]:
    """The next `rows` rows. `rest` holds what was decoded too much, before and after."""
    taken: list[Piece] = []
    while rows:
        piece = rest.pop() if rest else next(pieces)
        head = piece.cut(piece.first_row, piece.first_row + rows)
        if head.rows < piece.rows:
            rest.append(piece.cut(piece.first_row + head.rows, piece.first_row + piece.rows))
        taken.append(head)
        rows -= head.rows
    return taken
