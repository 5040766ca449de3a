"""Write the files of one table of an export from rows in any order, with bounded memory.

Rows are gathered in memory; where they are more than `MEMORY_BYTES` they go to files by the first 8 bits of
their hash, each of which is then sorted for itself. The files depend on the rows alone, not on their order: exports of
one model made on other numbers of ranks, or by changes from day to day, are the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np

from tessera.ctr.serving.decay import Decay
from tessera.ctr.serving.description import StoredGroup, StoredTable
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import SealedWriter
from tessera.ctr.serving.table_files import STARTS, Packing, columns_of, mixed
from tessera.kernels.formats import is_int

MEMORY_BYTES = 1 << 28
PARTS_BITS = 8  # of the hash, by which rows are divided where they do not fit the memory


def folder_of(table: str) -> str:
    """Return the folder of a table in an export."""
    quoted = quote(table, safe="")
    return f"tables/{quoted if quoted.strip('.') else quoted.replace('.', '%2E') or '%'}"


def groups_of(table: str, groups: Sequence[tuple[str, int, str]]) -> tuple[StoredGroup, ...]:
    """Return a table's groups with the files that hold them. groups: name, dim, format."""
    folder = folder_of(table)
    return tuple(
        StoredGroup(
            name,
            dim,
            format,
            f"{folder}/{quote(name, safe='')}.values.npy",
            f"{folder}/{quote(name, safe='')}.scales.npy" if is_int(format) else None,
        )
        for name, dim, format in groups
    )


class TableWriter:
    """Takes the rows of one dynamic table, each id once, and writes its files at the end.

    decay: of its rows, which note it where they decay. memory_bytes: of rows that are held before they go to files.
    """

    def __init__(
        self,
        name: str,
        features: Sequence[str],
        groups: Sequence[StoredGroup],
        memory_bytes: int = MEMORY_BYTES,
        decay: Decay | None = None,
    ) -> None:
        self.name, self.features, self.groups = name, tuple(features), tuple(groups)
        self._decay = decay or Decay()
        self._folder, self._memory_bytes = folder_of(name), memory_bytes
        self._columns = columns_of(self._folder, groups, self._decay.floats)
        self._packing = Packing(self._columns)
        self._held: list[np.ndarray] = []
        self._held_bytes = self.rows = 0
        self._stack = ExitStack()
        self._parts: list[IO[bytes]] = []

    def add(self, columns: Sequence[np.ndarray]) -> None:
        """Add rows: ids int64 [n], then of each group its values as stored [n, columns] and, if it has them, scales;
        then, where rows decay, what they note."""
        rows = len(columns[0])
        if not rows:
            return
        packed = self._packing.packed(columns)
        self.rows += rows
        self._held.append(packed)
        self._held_bytes += packed.nbytes
        if self._held_bytes > self._memory_bytes:
            self._spill()

    def _spill(self) -> None:
        if not self._parts:
            place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tessera-export-")))
            self._parts = [
                self._stack.enter_context((place / f"{part:03d}").open("w+b")) for part in range(1 << PARTS_BITS)
            ]
        for packed in self._held:
            part = mixed(packed[:, :8].copy().view(np.int64).ravel()) >> np.uint64(64 - PARTS_BITS)
            order = np.argsort(part, kind="stable")
            ends = np.searchsorted(part[order], np.arange(1 << PARTS_BITS), side="right")
            sorted_rows, begin = packed[order], 0
            for file, end in zip(self._parts, ends.tolist(), strict=True):
                if end > begin:
                    file.write(sorted_rows[begin:end].data)
                begin = end
        self._held, self._held_bytes = [], 0

    def _sorted_parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the rows part by part in the order of their hash, with the hashes."""
        if self._parts:
            self._spill()
        parts: list[IO[bytes] | None] = [*self._parts] or [None]
        for part in parts:
            if part is None:
                packed = np.concatenate(self._held) if self._held else np.zeros((0, self._packing.width), np.uint8)
                self._held = []
            else:
                part.seek(0)
                packed = np.frombuffer(part.read(), np.uint8).reshape(-1, self._packing.width)
            hashes = mixed(packed[:, :8].copy().view(np.int64).ravel())
            order = np.argsort(hashes)
            hashes = hashes[order]
            if (hashes[1:] == hashes[:-1]).any():
                raise ExportError(f"table {self.name} holds an id twice")
            yield packed[order], hashes

    def finish(self, writer: SealedWriter) -> StoredTable:
        """Write the files and return the table's description. Raises ExportError: an id came twice; OSError."""
        bits = max(0, int(self.rows - 1).bit_length()) if self.rows else 0
        if self._parts:
            bits = max(bits, PARTS_BITS)
        with self._stack, ExitStack() as files:
            streams = []
            for column in self._columns:
                stream = files.enter_context(writer.open(column.path))
                shape = (self.rows, column.width) if column.width else (self.rows,)
                write_header(stream, column.dtype, shape)
                streams.append(stream)
            starts = files.enter_context(writer.open(f"{self._folder}/{STARTS}"))
            number = np.dtype("<u4") if self.rows < 2**32 else np.dtype("<u8")
            write_header(starts, number, ((1 << bits) + 1,))
            first, parts = 0, max(1, len(self._parts))
            for part, (packed, hashes) in enumerate(self._sorted_parts()):
                at = 0
                for column, stream in zip(self._columns, streams, strict=True):
                    stream.write(np.ascontiguousarray(packed[:, at : at + column.bytes]))
                    at += column.bytes
                buckets = np.arange((part << bits) // parts, ((part + 1) << bits) // parts)
                places = hashes >> np.uint64(64 - bits) if bits else np.zeros(len(hashes), np.uint64)
                starts.write((first + np.searchsorted(places, buckets.astype(np.uint64))).astype(number))
                first += len(hashes)
            starts.write(np.array([self.rows], number))
        return StoredTable(
            self.name,
            self.features,
            "dynamic",
            self._folder,
            self.rows,
            bits,
            self.groups,
            self._decay.floats,
            self._decay.decayed,
        )


def write_array(writer: SealedWriter, path: str, values: np.ndarray) -> None:
    """Write one small .npy file."""
    values = np.ascontiguousarray(values)
    with writer.open(path) as stream:
        write_header(stream, values.dtype, values.shape)
        stream.write(values)


def write_header(stream: Any, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Write the begin of a .npy file; its values follow."""
    said = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, said)
