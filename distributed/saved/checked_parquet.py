"""Read parquet files whose row groups are each verified before use, so that loading reads a file once.

While a file is written, the CRC-32 of all bytes so far is noted behind each row group, and the notes go into the file's
metadata, which is its end. The manifest has the CRC-32 of the whole file. So continued from the last note, the bytes
behind the last row group lead to the manifest's number only if notes and metadata are as they were written; and each
row group must lead from one note to the next.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tessera.distributed.saved.storage import ChecksumStream, Sealed, Storage, let_go
from tessera.embedding.errors import TesseraError

NOTES = "tessera.crc32_behind_row_groups"
MAGIC = b"PAR1"  # begins and ends a parquet file; before its end stands the size of the metadata, in 4 bytes
PIECE_BYTES = 1 << 22  # read and checked at once: it is in the processor's cache for the second


class DamagedFile(TesseraError):
    """Raised when a row group is not what was written, or cannot be read.

    Attributes: storage, path: the file.
    """

    def __init__(self, storage: Storage, path: str, problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.storage, self.path = storage, path


@contextmanager
def as_rows(storage: Storage, path: str) -> Iterator[None]:
    """Raise DamagedFile for errors in this block, which reads a file that `write_columns` wrote."""
    try:
        yield
    except OSError as error:
        raise DamagedFile(storage, path, f"cannot be read: {error.strerror or error}") from error
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, pa.ArrowException) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DamagedFile(storage, path, f"does not hold rows as this version writes them ({reason})") from error


class Notes:
    """Checksums of a file in progress. Make it when a parquet writer has begun the file; call `add` after each row
    group, and `metadata` before the writer ends."""

    def __init__(self, stream: ChecksumStream) -> None:
        self._stream, self._notes = stream, [(stream.bytes, stream.crc32)]

    def add(self) -> None:
        self._notes.append((self._stream.bytes, self._stream.crc32))

    def metadata(self) -> dict[str, str]:
        return {NOTES: json.dumps(self._notes)}


class CheckedParquet:
    """Reads a file that `write_columns` wrote. Files from before there were checksum notes are read unchecked.

    Attributes:
        metadata: Arrow's of the file. schema: of its rows. They are not checked but by `leads_to`.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        with as_rows(storage, path):
            self._file = storage.open(path, buffered=False)
        try:
            with as_rows(storage, path):
                self._window = _Window(self._file)
                self._parquet = pq.ParquetFile(pa.PythonFile(self._window, mode="r"))
                self.metadata, self.schema = self._parquet.metadata, self._parquet.schema_arrow
                self._notes = json.loads(self.metadata.metadata.get(NOTES.encode(), "null"))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> CheckedParquet:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def as_rows(self) -> AbstractContextManager[None]:
        """Return `as_rows` of this file."""
        return as_rows(self._storage, self._path)

    def leads_to(self, sealed: Sealed) -> bool:
        """Return whether notes and metadata match the checksum in the manifest. Then only `read` is left to check."""
        if self._notes is None:
            return False
        (first, begun), (last, ended) = self._notes[0], self._notes[-1]
        sizes = first == len(MAGIC) and last + self.metadata.serialized_size + 4 + len(MAGIC) == sealed.bytes
        return (
            sizes  # so that little is read
            and self._window.size() == sealed.bytes
            and self._window.load(0, first, 0) == begun
            and self._window.load(last, sealed.bytes, ended) == sealed.crc32
        )

    def read(self, group: int, *, once: bool = False) -> pa.Table:
        """Return a row group after checking it. once: nobody else reads it, and the system need not keep it in memory.
        Raises DamagedFile."""
        if self._notes is not None:
            with as_rows(self._storage, self._path):
                (begin, before), (end, behind) = self._notes[group : group + 2]
                if not 0 <= begin <= end <= self._window.size():
                    raise DamagedFile(self._storage, self._path, f"is damaged in row group {group}")
                found = self._window.load(begin, end, before, once=once and self._storage.local)
            if found != behind:
                raise DamagedFile(self._storage, self._path, f"is damaged in row group {group}")
        return self._parquet.read_row_group(group, use_threads=False)


class _Window:
    """File object for Arrow that serves the part that was loaded last without a copy.

    The memory of that part is taken for the next one: Arrow's columns are copies of the pages that it decodes.
    """

    closed = False

    def __init__(self, file: Any) -> None:
        self._file, self._at = file, 0
        self._size = file.seek(0, 2)
        self._memory, self._begin, self._end = bytearray(), 0, 0

    def load(self, begin: int, end: int, crc: int, *, once: bool = False) -> int | None:
        """Load bytes [begin, end) into memory. Returns the CRC-32 continued over them, None if the file ends before.

        once: of a local file; the page cache does not grow by it. New memory takes longer to get than the bytes
        themselves where a host has to find it.
        """
        if len(self._memory) < end - begin:
            self._memory = bytearray(end - begin)
        self._begin = self._end = begin
        self._file.seek(begin)
        view = memoryview(self._memory)
        while self._end < end:
            at = self._end - begin
            count = self._file.readinto(view[at : min(at + PIECE_BYTES, end - begin)])
            if not count:
                return None
            crc = zlib.crc32(view[at : at + count], crc)
            self._end += count
            if once:
                # The piece before again: of what the system reads at once, it gives back only what lies within.
                let_go(self._file, max(0, self._end - count - PIECE_BYTES), self._end)
        return crc

    def size(self) -> int:
        return int(self._size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read_buffer(self, count: int) -> pa.Buffer:
        begin, end = self._at, min(self._at + count, self._size)
        self._at = end
        if self._begin <= begin and end <= self._end:
            return pa.py_buffer(memoryview(self._memory)[begin - self._begin : end - self._begin])
        self._file.seek(begin)
        return pa.py_buffer(self._file.read(end - begin))

    read = read_buffer

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: whoever opened the file closes it."""


def problem_but_for_groups(storage: Storage, path: str, sealed: Sealed) -> str | None:
    """Return the same as `Storage.problem`, without reading the row groups that `CheckedParquet.read` will check."""
    # Whatever is read wrongly out of a damaged file, the checksum will say what is wrong.
    with suppress(Exception), CheckedParquet(storage, path) as file:
        if file.leads_to(sealed):
            return None
    return storage.problem(path, sealed)
