"""Tables of an export: memory-mapped .npy files with a hash index, which any process opens in a millisecond.

Rows lie in the order of h = mix64(id), as unsigned numbers. `starts.npy` has for each value of the first `bits` bits
of h the first row that has it, and one more at the end; `ids.npy` the id of each row. So an id's row is looked for
among about one row:

    bucket = mix64(id) >> (64 - bits);  row in starts[bucket] .. starts[bucket + 1] - 1 with ids[row] == id

A static table has no index: its row is mix64(id) modulo its rows.
"""

from __future__ import annotations

import numpy as np
import torch

from tessera.ctr.serving.description import StoredGroup, StoredTable
from tessera.ctr.serving.errors import ExportError
from tessera.kernels.formats import DTYPES, is_int
from tessera.kernels.mix import mix64
from tessera.kernels.quantise import dequantise

STARTS, IDS = "starts.npy", "ids.npy"


def mixed(ids: np.ndarray) -> np.ndarray:
    """Return mix64 of int64 [n] as uint64 [n]."""
    return mix64(torch.from_numpy(np.array(ids, np.int64))).numpy().view(np.uint64)


def opened(path: str) -> np.ndarray:
    """Memory-map a .npy file; nothing of it is read yet. Raises ExportError: it is none."""
    try:
        header = np.load(path, mmap_mode="r", allow_pickle=False)
        return header if header.size else np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


class TableFiles:
    """One table of an export, open for reading by any number of threads.

    Raises ExportError: files are missing, or of another shape than the description says.
    """

    def __init__(self, folder: str, table: StoredTable) -> None:
        self.table = table
        self._values = [opened(f"{folder}/{group.values}") for group in table.groups]
        self._scales = [opened(f"{folder}/{group.scales}") if group.scales else None for group in table.groups]
        self._dynamic = table.kind == "dynamic"
        if self._dynamic:
            self._starts = opened(f"{folder}/{table.folder}/{STARTS}")
            self._ids = opened(f"{folder}/{table.folder}/{IDS}")
            self._shift = np.uint64(64 - table.bits)
            if len(self._ids) != table.rows or len(self._starts) != (1 << table.bits) + 1:
                raise ExportError(f"{folder}/{table.folder} holds another index than the description says")
        if any(len(values) != table.rows for values in self._values):
            raise ExportError(f"{folder}/{table.folder} holds other rows than the description says")

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id, int64 [n]; -1 for ids without one."""
        table = self.table
        if not self._dynamic:
            return mix64(torch.from_numpy(np.array(ids, np.int64))).remainder(table.rows).numpy()
        found = np.full(len(ids), -1, np.int64)
        if not table.rows or not len(ids):
            return found
        bucket = (mixed(ids) >> self._shift).astype(np.int64) if table.bits else np.zeros(len(ids), np.int64)
        row, end = self._starts[bucket].astype(np.int64), self._starts[bucket + 1].astype(np.int64)
        asked = np.flatnonzero(row < end)
        while len(asked):
            same = self._ids[row[asked]] == ids[asked]
            found[asked[same]] = row[asked[same]]
            asked = asked[~same]
            row[asked] += 1
            asked = asked[row[asked] < end[asked]]
        return found

    def read(self, rows: np.ndarray, group: int) -> torch.Tensor:
        """Return one group of some rows, float32 [n, dim]. rows: int64 [n], none negative."""
        scales = self._scales[group]
        stored = stored_tensor(self._values[group].take(rows, axis=0), self.table.groups[group])
        sizes = None if scales is None else torch.from_numpy(scales.take(rows))
        return dequantise(stored, sizes, self.table.groups[group].format, self.table.groups[group].dim)

    def raw(self, begin: int, end: int) -> list[np.ndarray]:
        """Return rows of a dynamic table as they lie: ids, then values and scales of each group."""
        found = [np.asarray(self._ids[begin:end])]
        for values, scales in zip(self._values, self._scales, strict=True):
            found += [np.asarray(values[begin:end])] + ([] if scales is None else [np.asarray(scales[begin:end])])
        return found


def stored_tensor(values: np.ndarray, group: StoredGroup) -> torch.Tensor:
    """Return rows as the kernels take them; bfloat16, which numpy lacks, lies in files as uint16."""
    tensor = torch.from_numpy(values)
    return tensor if is_int(group.format) else tensor.view(DTYPES[group.format])
