"""Tell a parquet file from another one of the same name, without reading its rows."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.files import DataFile, one_line

END, ENCRYPTED_END = b"PAR1", b"PARE"
SMALL_BYTES = 1 << 20
TAIL_BYTES = 64 << 10  # one request; most footers are smaller
PAGE_BYTES = 16 << 10


@dataclass(frozen=True)
class FileDigest:
    """A file's size in bytes, a checksum of its footer or (of a small file) of all of it, and what the footer says."""

    size: int
    checksum: str
    metadata: pq.FileMetaData
    schema: pa.Schema


def read_seal(
    file: DataFile, small_bytes: int = SMALL_BYTES, columns: Collection[str] = (), groups: int = 0
) -> FileDigest:
    """Read a file's footer, and all of a file of up to `small_bytes`.

    Footers hold the place, the stored size and the statistics of every column of every row group. In a small file these
    can agree by chance where values differ, so that it counts whole. In a large one they can agree for labels, which
    are stored as a bit each: of `columns` the first pages count, too, in so many row groups all over the file.

    Raises DataError for what is no whole parquet file.
    """
    try:
        with file.filesystem.open_input_file(file.location) as stream:
            size = stream.size()
            tail = _footer(file, stream, size, size if size <= small_bytes else min(size, TAIL_BYTES))
            with pq.ParquetFile(pa.BufferReader(tail)) as parquet:
                metadata, schema = parquet.metadata, parquet.schema_arrow
            if size <= small_bytes:
                return FileDigest(size, hashlib.sha256(tail).hexdigest(), metadata, schema)
            checksum = hashlib.sha256(tail[-8 - _length(tail) :])
            for first, count in _first_pages(metadata, columns, groups):
                stream.seek(first)
                checksum.update(stream.read(count))
            return FileDigest(size, checksum.hexdigest(), metadata, schema)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: no readable parquet footer: {one_line(error)}") from None


def _footer(file: DataFile, stream: pa.NativeFile, size: int, count: int) -> bytes:
    """Return the last `count` bytes, or as many more as the footer has."""
    tail = _last(stream, size, count)
    if tail[-4:] == ENCRYPTED_END:
        raise DataError(f"{file.path}: its footer is encrypted; write it anew without encryption")
    if len(tail) < 12 or tail[-4:] != END or not 0 < _length(tail) <= size - 12:
        raise DataError(f"{file.path}: no readable parquet footer in its {size:,} bytes")
    return tail if _length(tail) + 8 <= len(tail) else _last(stream, size, _length(tail) + 8)


def _length(tail: bytes) -> int:
    return struct.unpack("<I", tail[-8:-4])[0]


def _first_pages(metadata: pq.FileMetaData, columns: Collection[str], groups: int) -> Iterator[tuple[int, int]]:
    """Yield the offset and the number of the first bytes of some columns, in up to `groups` row groups from the first
    to the last."""
    count = min(groups, metadata.num_row_groups)
    for number in range(count):
        group = metadata.row_group(number * (metadata.num_row_groups - 1) // max(1, count - 1))
        for leaf in range(metadata.num_columns):
            chunk = group.column(leaf)
            if chunk.path_in_schema in columns:
                first = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
                yield first, min(PAGE_BYTES, chunk.total_compressed_size)


def _last(stream: pa.NativeFile, size: int, count: int) -> bytes:
    stream.seek(size - count)
    return stream.read(count)
