"""Look ids up in the tables of an export: what the tables of training give, pooled, averaged and projected."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tessera.ctr.data.bags import Bags
from tessera.ctr.serving.changes import ChangedTable, changed_table
from tessera.ctr.serving.description import Description
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.table_files import TableFiles, opened
from tessera.kernels.pool import pool


class Embeddings:
    """All tables of an export, open. Any number of threads may ask.

    Raises ExportError: files are missing or of another shape than the description says.
    """

    def __init__(
        self,
        folder: str,
        description: Description,
        id_names: Sequence[str],
        sequences: Sequence[str],
        *,
        weighted: bool,
    ) -> None:
        """id_names: features whose rows are pooled; sequences: those whose rows are read one by one."""
        self._names = list(id_names)
        self._groups = dict(description.groups)
        self._weighted = weighted
        self.tables: list[TableFiles | ChangedTable] = [TableFiles(folder, table) for table in description.tables]
        self._table_of = {name: number for number, t in enumerate(description.tables) for name in t.features}
        self._averaged = set(description.averaged)
        missing = [name for name in (*id_names, *sequences) if name not in self._table_of]
        if missing:
            raise ExportError(f"{folder} has no table for feature {missing[0]!r}")
        self._read_dense(folder, description)
        first, self._first = 0, {}
        for name, dim in self._groups.items():
            self._first[name] = first
            first += dim
        self._width = first

    def _read_dense(self, folder: str, description: Description) -> None:
        self._oov = None
        if description.oov is not None:
            self._oov = torch.from_numpy(np.array(opened(f"{folder}/{description.oov}")))
        self._projections = {
            (one.table, one.group): torch.from_numpy(np.array(opened(f"{folder}/{one.file}")))
            for one in description.projections
        }

    def with_changes(self, folder: str, description: Description, place: str) -> Embeddings:
        """Return the tables after the changes in a folder; these stay as they are. place: where appended rows may lie
        on the disk.

        Raises ExportError: they are no changes of these tables; OSError: there is no space.
        """
        changed = copy.copy(self)
        changed.tables = [changed_table(table, folder, place) for table in self.tables]
        changed._read_dense(folder, description)
        return changed

    def pooled(self, bags: Mapping[str, Bags], count: int, once: Mapping[str, Bags] | None = None) -> dict[str, Tensor]:
        """Return group -> [count, fields, dim] float32 of the features in `bags`, in the model's order; zeros for empty
        bags. once: of other features the bags of one row, which are looked up once and stand in every row."""
        names = [name for name in self._names if name in bags or name in (once or {})]
        if not names:
            return {group: torch.zeros(count, 0, dim) for group, dim in self._groups.items()}
        sums = self._sums(bags, [name for name in names if name in bags], count)
        if once:
            shared = [name for name in names if name not in bags]
            sums = self._beside(sums, self._sums(once, shared, 1), [name in bags for name in names], count)
        return self._projected(sums, names)

    def _sums(self, bags: Mapping[str, Bags], names: Sequence[str], count: int) -> dict[str, Tensor]:
        """Return group -> [count, fields, dim], the sums or means of the rows of some features, as wide as rows are."""
        if not names:
            return {group: torch.zeros(count, 0, dim) for group, dim in self._groups.items()}
        sizes = [len(bags[name].values) for name in names]
        begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        wide = self._rows(bags, names, begins)
        parts = [begin + bags[name].offsets[:-1] for name, begin in zip(names, begins, strict=False)]
        offsets = torch.from_numpy(np.concatenate([*parts, begins[-1:]]).astype(np.int64))
        weights = torch.from_numpy(_weights(bags, names)) if self._weighted else None
        index = torch.arange(len(wide))
        sums = dict(zip(self._groups, pool(wide, index, offsets, weights, len(names), self._dims()), strict=True))
        return self._scaled(sums, bags, names)

    def _beside(
        self, own: dict[str, Tensor], once: dict[str, Tensor], is_own: Sequence[bool], count: int
    ) -> dict[str, Tensor]:
        """Put fields that were looked up once beside those of each row. is_own: of each field in the model's order."""
        mine = torch.tensor(is_own)
        found = {}
        for group, dim in self._groups.items():
            found[group] = torch.empty(count, len(is_own), dim)
            found[group][:, mine], found[group][:, ~mine] = own[group], once[group]
        return found

    def one_by_one(self, bags: Mapping[str, Bags], names: Sequence[str]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the rows of the ids of some features, of each group the features in their order, float32 [ids, dim],
        where a table's rows are narrower than the tower wants [ids, rows' dim], and the matrix that makes them so
        wide; None for others."""
        begins = np.concatenate([[0], np.cumsum([len(bags[name].values) for name in names])]).astype(np.int64)
        wide = self._rows(bags, names, begins)
        found, matrices = [], []
        for group, dim in self._groups.items():
            for place, name in enumerate(names):
                matrix = self._projections.get((self.tables[self._table_of[name]].table.name, group))
                width = dim if matrix is None else matrix.shape[0]
                first = self._first[group]
                found.append(wide[begins[place] : begins[place + 1], first : first + width])
                matrices.append(matrix)
        return found, matrices

    def _dims(self) -> list[int]:
        return list(self._groups.values())

    def _rows(self, bags: Mapping[str, Bags], names: Sequence[str], begins: np.ndarray) -> Tensor:
        """Return the row of every id, float32 [ids, width]: zeros, or the OOV row, for ids without one."""
        wide = torch.zeros(int(begins[-1]), self._width)
        for number, table in enumerate(self.tables):
            own = [place for place, name in enumerate(names) if self._table_of[name] == number]
            if not own:
                continue
            places = np.concatenate([np.arange(begins[place], begins[place + 1]) for place in own])
            rows = table.find(np.concatenate([bags[names[place]].values for place in own]))
            known = rows >= 0
            all_known = bool(known.all())
            if not all_known:
                if self._oov is not None:
                    wide[torch.from_numpy(places[~known])] = self._oov[number]
                rows, places = rows[known], places[known]
            at = _span(places)
            for place, group in enumerate(table.table.groups):
                first = self._first[group.name]
                wide[at, first : first + group.dim] = table.read(rows, place)
        return wide

    def _scaled(self, sums: dict[str, Tensor], bags: Mapping[str, Bags], names: Sequence[str]) -> dict[str, Tensor]:
        """Divide the sums of averaged features by the lengths of their bags."""
        long = [name in self._averaged and bool((np.diff(bags[name].offsets) > 1).any()) for name in names]
        if not any(long):
            return sums
        scale = np.ones((len(names), len(next(iter(sums.values())))), np.float32)
        for place, name in enumerate(names):
            if long[place]:
                scale[place] = np.float32(1) / np.maximum(np.diff(bags[name].offsets), 1).astype(np.float32)
        scale_bf1 = torch.from_numpy(scale).t().unsqueeze(2)
        return {group: sums_bfd * scale_bf1 for group, sums_bfd in sums.items()}

    def _projected(self, sums: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        for (table, group), matrix in self._projections.items():
            of_table = next(number for number, one in enumerate(self.tables) if one.table.name == table)
            fields = [place for place, name in enumerate(names) if self._table_of[name] == of_table]
            if fields:
                sums[group][:, fields] = sums[group][:, fields, : matrix.shape[0]] @ matrix
        return sums


def _weights(bags: Mapping[str, Bags], names: Sequence[str]) -> np.ndarray:
    parts = [bags[name].weights for name in names]
    ones = [np.ones(len(bags[name].values), np.float32) for name in names]
    return np.concatenate([one if part is None else part for part, one in zip(parts, ones, strict=True)])


def _span(places: np.ndarray) -> slice | Tensor:
    """Return the places as a slice where they lie one behind the other, which writes without an index."""
    if len(places) and places[-1] - places[0] + 1 == len(places):
        return slice(int(places[0]), int(places[-1]) + 1)
    return torch.from_numpy(places)
