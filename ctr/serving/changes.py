"""Rows of tables that have changed since an export was written, laid over it without rewriting it.

What one publication changes lies in a folder of its own, which is never written again: of each table `rows.npy`, its
rows in the order in which they were published (ids, then values and scales of each group, one behind the other, then
what they note of decay), `gone.npy`, the ids whose rows were given up, and, where rows decay, `decayed.npy`, how far
they are then. In memory a table has the sorted ids of all that has changed and where
the row of each lies now, so that a look-up asks two indexes whatever the number of changes. The rows themselves are
appended to a file without a name, mapped into memory: what has been read from it stays as it is, so that a version of
a model goes on to read its own rows while the next one is made.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from tessera.ctr.serving.conversion import Conversion
from tessera.ctr.serving.decay import kept
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import SealedWriter
from tessera.ctr.serving.model_files import TablePlan
from tessera.ctr.serving.saved_models import SavedModel, is_in
from tessera.ctr.serving.table_files import (
    PART_ROWS,
    Packing,
    TableFiles,
    columns_of,
    floats,
    opened,
    read_here_and_there,
)
from tessera.ctr.serving.table_writer import folder_of, write_array, write_header

ROWS, GONE, DECAYED = "rows.npy", "gone.npy", "decayed.npy"
WITHOUT = -1  # the place of an id whose row was given up


def write_changes(writer: SealedWriter, plan: TablePlan, model: SavedModel) -> None:
    """Write what one publication changes of a table, some rows at a time. Raises ExportError: it is damaged."""
    folder, rows = folder_of(plan.name), model.row_count(plan.name)
    decay = model.decay_of(plan.name)
    conversion, packing = Conversion(plan.stored, plan.groups), Packing(columns_of(folder, plan.groups, decay.floats))
    with writer.open(f"{folder}/{ROWS}") as stream:
        write_header(stream, np.dtype("u1"), (rows, packing.width))
        for part in model.rows(plan.name):
            rows -= len(part.ids)
            stream.write(packing.packed(conversion.columns(part)))
    if rows:
        raise ExportError(f"{model.place.name} has {-rows:+,} rows of table {plan.name} beside what its footers say")
    write_array(writer, f"{folder}/{GONE}", model.gone(plan.name).astype("<i8"))
    if decay.floats:
        write_array(writer, f"{folder}/{DECAYED}", np.array([decay.decayed]))


class AppendedRows:
    """Packed rows of a table in a file without a name, to which others are added. Threads may add."""

    def __init__(self, place: str, width: int) -> None:
        """place: a folder on the disk that holds the rows. width: bytes of one."""
        self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115, it is open as long as a version reads it
        self._width = width
        self._rows = 0
        self._places: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, name: str, packed: np.ndarray) -> tuple[int, np.ndarray]:
        """Add rows, uint8 [n, width], unless those of that name are there: an update that failed is tried again.

        Returns the place of the first of them, and all rows, mapped into memory. Raises OSError.
        """
        with self._lock:
            if name not in self._places:
                self._file.seek(self._rows * self._width)
                for begin in range(0, len(packed), PART_ROWS):
                    self._file.write(np.ascontiguousarray(packed[begin : begin + PART_ROWS]).data)
                self._file.flush()
                self._places[name] = self._rows
                self._rows += len(packed)
            first = self._places[name]
            if not self._rows:
                return first, np.zeros((0, self._width), np.uint8)
            rows = np.memmap(self._file, np.uint8, "r", shape=(self._rows, self._width))
            read_here_and_there(rows)
            return first, rows


class ChangedTable:
    """A dynamic table of an export with changes over it; answers as `TableFiles` does."""

    def __init__(
        self,
        base: TableFiles,
        appended: AppendedRows,
        rows: np.ndarray,
        ids: np.ndarray,
        places: np.ndarray,
        decayed: float,
    ) -> None:
        """rows: all that were appended, packed. ids: of all that has changed, sorted; places: of each its appended row,
        or WITHOUT. decayed: how far rows are decayed now, as `decay.py` says."""
        self.table, self._base = replace(base.table, decayed=decayed), base
        self._appended, self._rows = appended, rows
        self._ids, self._places = ids, places
        self._packing = Packing(columns_of(base.table.folder, base.table.groups, base.table.decay_floats))
        widths = [1 if group.scales is None else 2 for group in base.table.groups]  # values, and scales
        self._columns = [(1 + sum(widths[:place]), width) for place, width in enumerate(widths)]

    @property
    def changed(self) -> int:
        """Ids whose rows were written or given up since the export."""
        return len(self._ids)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id, int64 [n]; -1 for ids without one. Appended rows come after the export's."""
        if not len(self._ids):
            return self._base.find(ids)
        at = np.searchsorted(self._ids, ids)
        at[at == len(self._ids)] = 0
        changed = self._ids[at] == ids
        if not changed.any():
            return self._base.find(ids)
        places = self._places[at[changed]]
        found = np.empty(len(ids), np.int64)
        found[changed] = np.where(places == WITHOUT, -1, places + self.table.rows)
        found[~changed] = self._base.find(ids[~changed])
        return found

    def read(self, rows: np.ndarray, group: int) -> torch.Tensor:
        """Return one group of some rows, float32 [n, dim]. rows: int64 [n], none negative."""
        values = self._undecayed(rows, group)
        return values * kept(self._noted(rows), self.table.decayed)[:, None] if self.table.decay_floats else values

    def _noted(self, rows: np.ndarray) -> np.ndarray:
        own, noted = rows >= self.table.rows, np.empty((len(rows), self.table.decay_floats))
        appended = self._rows.take(rows[own] - self.table.rows, axis=0)
        noted[own] = self._packing.unpacked(appended, len(self._packing.columns) - 1)[0]
        noted[~own] = self._base.noted(rows[~own])
        return noted

    def _undecayed(self, rows: np.ndarray, group: int) -> torch.Tensor:
        own = rows >= self.table.rows
        if not own.any():
            return self._base.undecayed(rows, group)
        appended = self._rows.take(rows[own] - self.table.rows, axis=0)
        changed = self._packing.unpacked(appended, *self._columns[group])
        if own.all():
            return floats(changed, self.table.groups[group])
        both = []
        for theirs, mine in zip(self._base.stored(rows[~own], group), changed, strict=True):
            whole = np.empty((len(rows), *mine.shape[1:]), mine.dtype)
            whole[~own], whole[own] = theirs, mine
            both.append(whole)
        return floats(both, self.table.groups[group])

    def parts(self) -> Iterator[list[np.ndarray]]:
        """Yield the rows that ids have now, some at a time, as they lie: ids, then values and scales of each group,
        then what they note of decay."""
        for columns in self._base.parts():
            kept = ~is_in(columns[0], self._ids)
            yield [column[kept] for column in columns]
        places = np.sort(self._places[self._places != WITHOUT])
        for begin in range(0, len(places), PART_ROWS):
            yield self._packing.unpacked(self._rows.take(places[begin : begin + PART_ROWS], axis=0))

    def with_changes(self, folder: str) -> ChangedTable:
        """Return the table after the changes in a folder; this one stays as it is. Raises ExportError: they are none,
        or of another table."""
        packed, gone = (opened(f"{folder}/{self.table.folder}/{name}", in_order=True) for name in (ROWS, GONE))
        if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != self._packing.width:
            raise ExportError(f"{folder}/{self.table.folder} holds other rows than the export")
        written = self._packing.unpacked(packed, 0, 1)[0]
        ids = np.concatenate([written, gone[~np.isin(gone, written)]])
        first, rows = self._appended.add(folder, packed)
        places = np.full(len(ids), WITHOUT, np.int64)
        places[: len(written)] = first + np.arange(len(written))
        order = np.argsort(ids)
        index = _over(self._ids, self._places, ids[order], places[order])
        if (index[0][1:] == index[0][:-1]).any():
            raise ExportError(f"{folder}/{self.table.folder} holds an id twice")
        decayed = 0.0
        if self.table.decay_floats:
            decayed = float(opened(f"{folder}/{self.table.folder}/{DECAYED}")[0])
        return ChangedTable(self._base, self._appended, rows, *index, decayed)


def _over(
    ids: np.ndarray, places: np.ndarray, new_ids: np.ndarray, new_places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted ids and their places, where new ones replace old ones."""
    at = np.searchsorted(ids, new_ids)
    same = np.zeros(len(new_ids), bool)
    inside = at < len(ids)
    same[inside] = ids[at[inside]] == new_ids[inside]
    places = places.copy()
    places[at[same]] = new_places[same]
    return np.insert(ids, at[~same], new_ids[~same]), np.insert(places, at[~same], new_places[~same])


def changed_table(table: TableFiles | ChangedTable, folder: str, place: str) -> ChangedTable:
    """Return a dynamic table after the changes in a folder. place: where appended rows may lie on the disk.

    Raises ExportError: they are none, or of another table; OSError: there is no space.
    """
    if isinstance(table, TableFiles):
        width = Packing(columns_of(table.table.folder, table.table.groups, table.table.decay_floats)).width
        none = np.zeros(0, np.int64)
        first = AppendedRows(place, width), np.zeros((0, width), np.uint8), none, none, table.table.decayed
        table = ChangedTable(table, *first)
    return table.with_changes(folder)
