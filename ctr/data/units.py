"""Cut a data set into units of whole row groups that one rank reads by itself, in the order of the rows as stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.footers import RowGroups


@dataclass(frozen=True)
class Unit:
    """Row groups [first, stop) of one file, counted over all files. name: of the file that is written for them, below
    the folder of all results."""

    name: str
    first: int
    stop: int
    rows: int


def units_of(groups: RowGroups, most_rows: int) -> list[Unit]:
    """Return the units of a data set, in its order: a file each, and several of a file with more than `most_rows` rows.

    They depend on the files alone, not on ranks.

    Raises DataError: two files of the same name, below different paths or but for their suffixes.
    """
    units: list[Unit] = []
    for number, file in enumerate(groups.files):
        mine = np.flatnonzero(groups.file == number)
        path = PurePosixPath(file.name)
        if not len(mine):  # a file without rows becomes one without rows
            units.append(Unit(str(path.with_name(f"{path.stem}.parquet")), 0, 0, 0))
            continue
        cuts = _cuts(groups.rows[mine].tolist(), most_rows)
        parts = len(cuts) - 1
        for part, (first, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            suffix = "" if parts == 1 else f".{part:04d}-of-{parts:04d}"
            rows = int(groups.rows[mine[first:stop]].sum())
            name = str(path.with_name(f"{path.stem}{suffix}.parquet"))
            units.append(Unit(name, int(mine[0]) + first, int(mine[0]) + stop, rows))
    names = [unit.name for unit in units]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise DataError(
            f"{twice} would be written for two files: they have this name below different paths, or differ in their "
            "suffix alone; expected one path, or one at a time"
        )
    return units


def dealt(units: list[Unit], ranks: int) -> list[list[Unit]]:
    """Deal units to ranks: the largest first, each to the rank that has least rows; each rank's in their order."""
    shares: list[list[Unit]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for unit in sorted(units, key=lambda one: (-one.rows, one.first)):
        rank = min(range(ranks), key=loads.__getitem__)
        shares[rank].append(unit)
        loads[rank] += unit.rows
    return [sorted(share, key=lambda one: one.first) for share in shares]


def _cuts(rows: list[int], most_rows: int) -> list[int]:
    """Return where row groups of so many rows are cut, both ends included, so that a part has at most `most_rows`."""
    cuts, inside = [0], 0
    for place, more in enumerate(rows):
        if inside and inside + more > most_rows:
            cuts.append(place)
            inside = 0
        inside += more
    return [*cuts, len(rows)]
