"""Tables of an export: memory-mapped .npy files with a hash index, which any process opens in a millisecond.

Rows lie in the order of h = mix64(id), as unsigned numbers. `starts.npy` has for each value of the first `bits` bits
of h the first row that has it, and one more at the end; `ids.npy` the id of each row. So an id's row is looked for
among about one row:

    bucket = mix64(id) >> (64 - bits);  row in starts[bucket] .. starts[bucket + 1] - 1 with ids[row] == id

A static table has no index: its row is mix64(id) modulo its rows.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tessera.ctr.serving.decay import kept
from tessera.ctr.serving.description import StoredGroup, StoredTable
from tessera.ctr.serving.errors import ExportError
from tessera.kernels.formats import DTYPES, is_int, stored_columns
from tessera.kernels.mix import mix64
from tessera.kernels.quantise import dequantise

STARTS, IDS, DECAY = "starts.npy", "ids.npy", "decay.npy"
NUMPY = {"fp32": "<f4", "fp16": "<f2", "bf16": "<u2"}
PART_ROWS = 1 << 16  # that are read at once where all are


@dataclass(frozen=True)
class Column:
    """One .npy file: its path, dtype and elements of a row (0: a vector)."""

    path: str
    dtype: np.dtype
    width: int

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * max(1, self.width)


def columns_of(folder: str, groups: Sequence[StoredGroup], decay_floats: int = 0) -> list[Column]:
    """Return the files of a table's rows, in its folder: ids, then values and, of int formats, scales of each group;
    then, where rows decay, what they note."""
    columns = [Column(f"{folder}/{IDS}", np.dtype("<i8"), 0)]
    for group in groups:
        kind = np.dtype("u1") if is_int(group.format) else np.dtype(NUMPY[group.format])
        columns.append(Column(group.values, kind, stored_columns(group.format, group.dim)))
        if group.scales is not None:
            columns.append(Column(group.scales, np.dtype("<f4"), 0))
    if decay_floats:
        columns.append(Column(f"{folder}/{DECAY}", np.dtype("<f8"), decay_floats))
    return columns


class Packing:
    """Rows of a table with all columns of a row one behind the other, as bytes."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = list(columns)
        self.width = sum(column.bytes for column in columns)

    def packed(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Return rows as uint8 [n, width]. arrays: one a column, as `columns_of` has them."""
        rows = len(arrays[0])
        packed = np.empty((rows, self.width), np.uint8)
        at = 0
        for column, values in zip(self.columns, arrays, strict=True):
            flat = np.ascontiguousarray(values, column.dtype).reshape(rows, -1).view(np.uint8)
            packed[:, at : at + column.bytes] = flat
            at += column.bytes
        return packed

    def unpacked(self, packed: np.ndarray, first: int = 0, count: int | None = None) -> list[np.ndarray]:
        """Return columns of packed rows: `count` of them from the one numbered `first`; None: all others."""
        at, found = sum(column.bytes for column in self.columns[:first]), []
        for column in self.columns[first : None if count is None else first + count]:
            part = np.ascontiguousarray(packed[:, at : at + column.bytes]).view(column.dtype)
            found.append(part if column.width else part.ravel())
            at += column.bytes
        return found


def mixed(ids: np.ndarray) -> np.ndarray:
    """Return mix64 of int64 [n] as uint64 [n]."""
    return mix64(torch.from_numpy(np.array(ids, np.int64))).numpy().view(np.uint64)


def opened(
    path: str, *, in_order: bool = False, dtype: np.dtype | None = None, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Memory-map a .npy file; nothing of it is read yet. in_order: it will be read from its begin to its end, and not
    here and there. dtype, shape: what it must have; None: any.

    Raises ExportError: it is none, or holds something else.
    """
    try:
        header = np.load(path, mmap_mode="r", allow_pickle=False)
        if not header.size:
            header = np.load(path, allow_pickle=False)
    except Exception as error:  # its header is Python, and numpy raises what Python's parsers do
        raise ExportError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if (dtype is not None and header.dtype != dtype) or (shape is not None and header.shape != shape):
        found = f"{header.dtype.str} {header.shape}"
        raise ExportError(f"{path} is damaged: it holds {found}, and the description says {dtype} {shape}")
    if header.size and not in_order:
        read_here_and_there(header)
    return header


def read_here_and_there(mapped: np.ndarray) -> None:
    """Tell the kernel that rows are read in no order: it then reads the page of a row from the disk and not 32 pages
    around it, of which a look-up by hash has no use and which would take the memory of pages that are."""
    base: Any = mapped
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base
    if base is not None and hasattr(mmap, "MADV_RANDOM"):
        base.madvise(mmap.MADV_RANDOM)


class TableFiles:
    """One table of an export, open for reading by any number of threads.

    Raises ExportError: files are missing, or of another shape than the description says.
    """

    def __init__(self, folder: str, table: StoredTable) -> None:
        self.table, self._folder = table, folder
        rows = table.rows
        columns = {one.path: one for one in columns_of(table.folder, table.groups, table.decay_floats)}

        def of(path: str) -> np.ndarray:
            column = columns[path]
            shape = (rows, column.width) if column.width else (rows,)
            return opened(f"{folder}/{path}", dtype=column.dtype, shape=shape)

        self._values = [of(group.values) for group in table.groups]
        self._scales = [of(group.scales) if group.scales else None for group in table.groups]
        self._decay = of(f"{table.folder}/{DECAY}") if table.decay_floats else None
        self._dynamic = table.kind == "dynamic"
        if self._dynamic:
            self._starts = opened(f"{folder}/{table.folder}/{STARTS}", shape=((1 << table.bits) + 1,))
            self._ids = of(f"{table.folder}/{IDS}")
            self._shift = np.uint64(64 - table.bits)
            if self._starts.dtype.kind not in "iu" or not self._starts.dtype.isnative:
                raise ExportError(f"{folder}/{table.folder}/{STARTS} is damaged: it holds {self._starts.dtype.str}")

    @property
    def changed(self) -> int:
        """Ids that have changed since the export: none."""
        return 0

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
        if (row < 0).any() or (end > table.rows).any():
            raise ExportError(f"{self._folder}/{table.folder}/{STARTS} is damaged: it leads to rows that are not there")
        asked = np.flatnonzero(row < end)
        while len(asked):
            same = self._ids[row[asked]] == ids[asked]
            found[asked[same]] = row[asked[same]]
            asked = asked[~same]
            row[asked] += 1
            asked = asked[row[asked] < end[asked]]
        return found

    def stored(self, rows: np.ndarray, group: int) -> list[np.ndarray]:
        """Return one group of some rows as it lies: values, and scales where it has them."""
        found, scales = [self._values[group].take(rows, axis=0)], self._scales[group]
        return found if scales is None else [*found, scales.take(rows)]

    def read(self, rows: np.ndarray, group: int) -> torch.Tensor:
        """Return one group of some rows, float32 [n, dim]. rows: int64 [n], none negative."""
        values = self.undecayed(rows, group)
        noted = self.noted(rows)
        return values if noted is None else values * kept(noted, self.table.decayed)[:, None]

    def undecayed(self, rows: np.ndarray, group: int) -> torch.Tensor:
        """Return one group of some rows as they were written last, float32 [n, dim]."""
        return floats(self.stored(rows, group), self.table.groups[group])

    def noted(self, rows: np.ndarray) -> np.ndarray | None:
        """Return how far some rows are decayed, float64 [n, 1 or 2]; None where rows do not decay."""
        return None if self._decay is None else self._decay.take(rows, axis=0)

    def parts(self) -> Iterator[list[np.ndarray]]:
        """Yield all rows of a dynamic table, some at a time, as they lie: ids, then values and scales of each group,
        then what they note of decay."""
        columns = columns_of(self.table.folder, self.table.groups, self.table.decay_floats)
        arrays = [opened(f"{self._folder}/{column.path}", in_order=True) for column in columns]
        for begin in range(0, self.table.rows, PART_ROWS):
            yield [np.asarray(array[begin : begin + PART_ROWS]) for array in arrays]


def floats(stored: Sequence[np.ndarray], group: StoredGroup) -> torch.Tensor:
    """Return rows of a group as float32 [n, dim]. stored: values, and scales where the format has them."""
    sizes = torch.from_numpy(stored[1]) if len(stored) > 1 else None
    return dequantise(stored_tensor(stored[0], group), sizes, group.format, group.dim)


def stored_tensor(values: np.ndarray, group: StoredGroup) -> torch.Tensor:
    """Return rows as the kernels take them; bfloat16, which numpy lacks, lies in files as uint16."""
    tensor = torch.from_numpy(values)
    return tensor if is_int(group.format) else tensor.view(DTYPES[group.format])
