"""Read row groups to Arrow arrays, column by column, in bounded memory.

A column is decoded, used and dropped before the next one is decoded: its 8 bytes times some ten thousand rows
stay in the processor's cache, and the allocator hands out the same memory again and again. Decoding all columns
of a row group first costs half as much time again, which goes to main memory.

Parquet cannot start in the middle of a row group, so a lane that begins there decodes and drops what comes
before; where several lanes begin in one row group (small data sets), it is decoded once for all of them.
"""

from __future__ import annotations

import errno
import resource
import threading
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.files import one_line
from tessera.ctr.data.footers import RowGroups
from tessera.ctr.data.lanes import chunk_rows

# Parsed footers kept: parsing takes as long as decoding a thousand rows.
FOOTERS_KEPT = 64
# Files that a thread holds open for a window of small row groups; a lane in a large row group holds one.
OPEN_FILES = 64
# Decoded bytes of row groups held for several lanes at once.
SHARED_BYTES = 512 << 20
# Larger row groups are read through a small buffer per column instead of a column as a whole.
WHOLE_READ_BYTES, READ_BUFFER_BYTES = 64 << 20, 256 << 10


class Unreadable(Exception):
    """Raised when a page of a row group cannot be decoded."""


class RowGroupReader:
    """Opens row groups for one rank's lanes, which may read from different threads."""

    def __init__(self, groups: RowGroups, columns: list[str], window_rows: int):
        self.groups = groups
        self.columns = columns
        self.window_rows = window_rows
        self._shared: dict[int, _Shared] = {}
        self._footers: dict[int, pq.FileMetaData] = {}  # of the files opened last

    def share(self, first_groups: list[int]) -> None:
        """Set the row group in which each of the lanes begins, before any of them reads."""
        budget = SHARED_BYTES
        for group, users in Counter(first_groups).items():
            if self.is_outside(group):
                continue
            budget -= int(self.groups.bytes[group]) if users > 1 else 0
            if users > 1 and budget >= 0:
                self._shared[group] = _Shared(users)

    def open(self, group: int, stop: int, *, begins_lane: bool, of_many: bool = False) -> RowGroup:
        """Open a row group. stop: where the lane leaves the group. begins_lane: the group is the first of its lane.
        of_many: it is read with too many others to keep the file open from column to column."""
        shared = self._shared.get(group) if begins_lane else None
        opened = RowGroup(self, group, stop)
        opened.together |= of_many
        if shared is not None:
            shared.give(opened)
        return opened

    def is_outside(self, group: int) -> bool:
        """Return whether no row of a row group passes the filter, so that it is not read."""
        return self.groups.outside is not None and bool(self.groups.outside[group])

    def parquet(self, group: int) -> pq.ParquetFile:
        number = int(self.groups.file[group])
        file = self.groups.files[number]
        large = self.groups.bytes[group] > WHOLE_READ_BYTES
        try:
            parquet = file.open(
                metadata=self._footers.get(number),
                read_dictionary=self.groups.dictionaries,
                pre_buffer=file.remote,  # one request for neighbouring columns instead of one for each
                buffer_size=READ_BUFFER_BYTES if large and not file.remote else 0,
                page_checksum_verification=True,
            )
        except (pa.ArrowException, OSError) as error:
            what = "cannot be opened any more"
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                what = (
                    f"this process may open no more files (ulimit -n {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}); "
                    f"raise that, or lower data.threads ({OPEN_FILES} files each) or data.lanes (one each)"
                )
            raise DataError(f"{file.path}: {what}: {one_line(error)}") from None
        if len(self._footers) >= FOOTERS_KEPT:
            self._footers.clear()
        self._footers[number] = parquet.metadata
        return parquet


class RowGroup:
    """One row group on its way through one lane; not for several threads at once."""

    def __init__(self, reader: RowGroupReader, group: int, stop: int):
        self.reader, self.group, self.stop = reader, group, stop
        self.index = int(reader.groups.index[group])
        self.rows = int(reader.groups.rows[group])
        self.chunk_rows = chunk_rows(self.rows, reader.window_rows)
        self.whole = self.rows <= self.chunk_rows
        # Over a network one request for all columns is quicker than one after the other.
        self.together = reader.groups.files[reader.groups.file[group]].remote
        self.error: str | None = None  # where and why it cannot be decoded
        self.outside = reader.is_outside(group)
        self._parquet: pq.ParquetFile | None = None
        self._key: tuple[str, ...] = ()  # columns of _chunk
        self._chunk: pa.Table | pa.RecordBatch | None = None
        self._streams: dict[tuple[str, ...], Iterator[tuple[int, pa.RecordBatch]]] = {}
        self._chunk_first = 0

    @property
    def is_read(self) -> bool:
        """Whether rows of it are decoded: it is not outside of the filter, and no page of it was broken so far."""
        return self.error is None and not self.outside

    def read(self, columns: tuple[str, ...], first: int, stop: int) -> list[list[pa.Array]]:
        """Return the rows [first, stop) of some columns, each as one or several arrays.

        In a row group that is not whole, rows must not go back, and not go over the end of a chunk. Raises
        Unreadable for a page that cannot be decoded, DataError when the file cannot be read any more.
        """
        key = tuple(self.reader.columns) if self.together else columns
        try:
            if self.whole:
                self._load_whole(key)
            else:
                self._load_until(key, stop)
        except (pa.ArrowException, OSError) as error:
            self._refuse_unreachable()
            column = "" if self.together else f" column {columns[0]!r}"
            self.error = f"{self.reader.groups.where(self.group)}{column}: cannot be decoded: {one_line(error)}"
            raise Unreadable from None
        assert self._chunk is not None
        first, rows = first - self._chunk_first, stop - first
        arrays = [self._chunk.column(name).slice(first, rows) for name in columns]
        return [a.chunks if isinstance(a, pa.ChunkedArray) else [a] for a in arrays]

    def load_all(self) -> pa.Table:
        """Read the whole row group with all columns."""
        self.stop = self.rows
        self.together = self.whole = True
        self._load_whole(tuple(self.reader.columns))
        return self._chunk

    def hold(self, table: pa.Table) -> None:
        """Read from this table from now on, which is the whole row group."""
        self.stop = self.rows
        self.together = self.whole = True
        self._key, self._chunk = tuple(self.reader.columns), table

    def close(self) -> None:
        """Close the file; what has been read stays valid."""
        if self._parquet is not None:
            self._streams.clear()
            self._parquet.close(force=True)
            self._parquet = None

    def _opened(self) -> pq.ParquetFile:
        if self._parquet is None:
            self._parquet = self.reader.parquet(self.group)
        return self._parquet

    def _load_whole(self, key: tuple[str, ...]) -> None:
        if self._key != key:
            self._chunk = None  # first, so that its memory serves for the next
            parquet, where = self._opened(), {"columns": list(key), "use_threads": False}
            if self.stop < self.rows:
                self._chunk = next(parquet.iter_batches(self.stop, row_groups=[self.index], **where), None)
            else:
                self._chunk = parquet.read_row_group(self.index, **where)
            self._key = key
            if self.together:
                self.close()
            self._check_rows(0 if self._chunk is None else self._chunk.num_rows, self.stop)

    def _load_until(self, key: tuple[str, ...], stop: int) -> None:
        chunk = self._chunk if self._key == key else None
        if chunk is not None and self._chunk_first + chunk.num_rows >= stop:
            return
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = self._batches(key)
        self._chunk = chunk = None
        first, batch = 0, None
        while batch is None or first + batch.num_rows < stop:
            first, batch = next(stream, (self.rows, None))
            if batch is None:
                self._check_rows(0, self.rows)
        self._key, self._chunk, self._chunk_first = key, batch, first

    def _batches(self, key: tuple[str, ...]) -> Iterator[tuple[int, pa.RecordBatch]]:
        first = 0
        batches = self._opened().iter_batches(
            self.chunk_rows, row_groups=[self.index], columns=list(key), use_threads=False
        )
        for batch in batches:
            yield first, batch
            first += batch.num_rows

    def _check_rows(self, found: int, expected: int) -> None:
        if found != expected:
            raise pa.ArrowInvalid(f"found fewer rows than the {self.rows} of the footer")

    def _refuse_unreachable(self) -> None:
        """Raise DataError if the file's bytes cannot be read: that is no reason to drop rows, as a page that cannot be
        decoded is."""
        groups = self.reader.groups
        file = groups.files[groups.file[self.group]]
        try:
            with file.filesystem.open_input_file(file.location) as stored:
                while stored.read(8 << 20):
                    pass
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read: {one_line(error)}") from None


class _Shared:
    """A row group in which several lanes begin: decoded by the first of them, kept until the last has begun."""

    def __init__(self, users: int):
        self.users = users
        self.lock = threading.Lock()
        self.table: pa.Table | None = None
        self.broken = False

    def give(self, group: RowGroup) -> None:
        with self.lock:
            if self.table is None and not self.broken:
                try:
                    self.table = group.load_all()
                except (pa.ArrowException, OSError):
                    self.broken = True  # each lane finds out for itself, and says so
            if self.table is not None:
                group.hold(self.table)
            self.users -= 1
            if not self.users:
                self.table = None
