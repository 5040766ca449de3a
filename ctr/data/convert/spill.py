"""Rows set aside in files by number, to be read back one number at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

MOST = 256  # files open at a time


class Spill:
    """`count` files of rows in a folder, which is made. Rows are kept in the order in which they come."""

    def __init__(self, folder: Path, count: int) -> None:
        assert 1 <= count <= MOST, count
        folder.mkdir()
        self.folder, self.count = folder, count
        self._writers: dict[int, pa.RecordBatchStreamWriter] = {}
        self.bytes = 0  # of what was appended, in memory

    def scatter(self, table: pa.Table, into: np.ndarray) -> None:
        """Append each row to the file that `into` [rows] gives it."""
        order = np.argsort(into, kind="stable")
        bounds = np.searchsorted(into[order], np.arange(self.count + 1))
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            self._append(number, table.take(pa.array(order[bounds[number] : bounds[number + 1]])))

    def _append(self, number: int, table: pa.Table) -> None:
        writer = self._writers.get(number)
        if writer is None:
            writer = self._writers[number] = pa.ipc.new_stream(str(self._path(number)), table.schema)
        self.bytes += table.nbytes
        writer.write_table(table.combine_chunks())

    def take(self, number: int) -> pa.Table | None:
        """Return the rows of one file, which is removed; None if there are none. Call after the last `scatter`."""
        writer = self._writers.pop(number, None)
        if writer is None:
            return None
        writer.close()
        path = self._path(number)
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        path.unlink()
        return table

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:03d}.arrow"
