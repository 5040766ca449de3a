"""Save and load dynamic tables: their rows, the ids pending admission, and the rest of their state.

A full state has all rows. A delta has the rows that changed since the state before it, and the ids whose rows were
evicted since then. A state is read newest folder first: a row found there, or evicted, hides older ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.distributed.collectives import on_all_ranks
from tessera.distributed.rank import Process
from tessera.distributed.saved.checked_parquet import DamagedFile
from tessera.distributed.saved.manifest import CheckpointError, files_listed, read_manifest
from tessera.distributed.saved.row_files import (
    EVICTED,
    PENDING,
    ROWS,
    Columns,
    ColumnSource,
    copied,
    count_rows,
    empty_columns,
    file_name,
    files_of,
    read_columns,
    rows_of,
    to_batch,
    write_columns,
)
from tessera.distributed.saved.states import DamagedState, Saved, first_problem
from tessera.distributed.saved.storage import Storage
from tessera.embedding.errors import TesseraError
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.set_table import OwnedTable

Tables = dict[str, OwnedTable]
READER = "states"  # of evicted ids
ADMISSION_COLUMNS = {"admission/ids": "id", "admission/counts": "count", "admission/last_seen": "last_seen"}


@dataclass
class TableParts:
    """This rank's part of all tables at one moment. files: (kind, table) -> rows; state: the rest, by name."""

    files: dict[tuple[str, str], ColumnSource]
    state: dict[str, Tensor]

    def write(self, storage: Storage, process: Process) -> None:
        try:
            for (kind, table), source in self.files.items():
                path = file_name(kind, table, process.rank, process.world_size)
                write_columns(storage, path, source, process.world_size)
                source.close()
        finally:
            for source in self.files.values():
                source.close()


class TableSaver:
    """Captures tables for saving, and remembers when, so that a delta can follow."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._marks: dict[str, int] = {}
        self._evicted_count: dict[str, float] = {}

    def can_follow(self) -> bool:
        """Return whether a delta would be complete on every rank: there was a state before, and the tables know all ids
        evicted since. Ranks agree, because a state is a delta as a whole or not at all: the main thread of each must
        ask."""
        mine = self._marks.keys() == self._tables.keys() and all(
            _evicted_count(table) - self._evicted_count[name] < table.config.evicted_kept
            for name, table in self._tables.items()
        )
        return on_all_ranks(mine)

    def take(self, *, delta: bool) -> TableParts:
        """Return the tables as they are now; training may go on while they are written."""
        parts = TableParts({}, {})
        for name, table in self._tables.items():
            parts.files[ROWS, name] = rows_of(table, since=self._marks[name] if delta else None)
            if delta:
                parts.files[EVICTED, name] = copied({"id": table.take_evicted(READER).cpu()})
            state = table.export_state()
            if "admission/ids" in state:
                pending = {column: state.pop(key).cpu() for key, column in ADMISSION_COLUMNS.items()}
                parts.files[PENDING, name] = copied(pending)
            parts.state |= {f"table/{name}/{key}": value for key, value in state.items()}
        return parts

    def follow(self, *, deltas: bool) -> None:
        """Record changes from here on, for a delta to what was taken last."""
        for name, table in self._tables.items() if deltas else ():
            if name not in self._marks:
                table.take_evicted(READER)
            self._marks[name] = table.mark()
            self._evicted_count[name] = _evicted_count(table)


def _evicted_count(table: OwnedTable) -> float:
    stats = table.stats()
    return stats["expired"] + stats["evicted"]


def describe_tables(tables: Tables) -> dict[str, dict[str, Any]]:
    """Return the columns, groups and optimizer of each table's rows, for loading them into another model."""
    described: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        columns = empty_columns(table)
        shapes = {key: [str(c.dtype).removeprefix("torch."), *c.shape[1:]] for key, c in columns.items()}
        groups = [[group.name, group.dim, group.format] for group in table.config.groups]
        described[name] = {"columns": shapes, "groups": groups, "optimizer": table.config.optimizer.name}
        if table.config.decay_floats:
            described[name]["decayed"] = table.decayed  # with which readers decay rows, whenever these were written
    return described


def _formats(groups: list[list[Any]]) -> str:
    return ", ".join(" ".join(map(str, group)) for group in groups)


def load_rows(
    tables: Tables,
    saved: Saved,
    process: Process,
    name_there: Callable[[str], str] = str,
    with_state: Callable[[str], bool] = lambda name: True,
    *,
    in_place: bool = False,
    with_periods: bool = True,
) -> None:
    """Fill this rank's empty tables with the rows that it owns, a few row groups at a time.

    Args:
        name_there: the name under which a table was saved. with_state: whether its optimizer state is wanted.
        in_place: give rows the numbers that they had; the ranks must be those that saved. with_periods: rows keep the
        period in which they were added; otherwise all are old.

    Raises:
        DamagedState: on every rank; rows are not those that were saved. Tables may hold some of the others.
        TesseraError: a table is missing there, or its rows are of another kind.
    """
    problem = None
    try:
        _fill(tables, saved, process, name_there, with_state, in_place=in_place, with_periods=with_periods)
    except DamagedFile as error:
        problem = _all_that_is_wrong(error)
    problem = first_problem(problem)
    if problem is not None:
        raise DamagedState(f"{saved.name} is passed over: {problem}")


def _all_that_is_wrong(error: DamagedFile) -> str:
    """Return the problem that a check of the whole file finds; the error itself if the check finds none."""
    try:
        sealed = files_listed(read_manifest(error.storage)).get(error.path)
    except CheckpointError as changed:
        return str(changed)
    return sealed and error.storage.problem(error.path, sealed) or str(error)


def _fill(
    tables: Tables,
    saved: Saved,
    process: Process,
    name_there: Callable[[str], str],
    with_state: Callable[[str], bool],
    *,
    in_place: bool,
    with_periods: bool,
) -> None:
    """Do the work of `load_rows`, but raise DamagedFile where it is found."""
    for name, table in tables.items():
        there = name_there(name)
        if not saved.folders[-1].names(f"rows/{file_name('', there, 0, 1).split('/')[1]}"):
            raise TesseraError(f"{saved.name} holds no rows of table {there}")
        described = saved.training.get("tables", {})
        if there not in described:
            raise TesseraError(f"{saved.name} does not describe table {there}, whose rows it holds")
        found = _formats(described[there]["groups"])
        expected = _formats(describe_tables({there: table})[there]["groups"])
        if found != expected:
            hint = "`tessera convert-tables` converts"
            raise TesseraError(f"{saved.name}: rows of table {there} have {found}; the model has {expected} ({hint})")
        table.decayed = decayed = decayed_in(saved, there)
        table.reserve(_rows_to_reserve(saved.folders[-1], there, process))
        hidden = torch.empty(0, dtype=torch.int64) if len(saved.folders) > 1 else None
        for folder in saved.folders:
            kinds = {"with_state": with_state(name), "with_rows": in_place, "with_periods": with_periods}
            for batch in _batches(table, folder, there, process, hidden, kinds, decayed):
                table.import_rows(batch)
            if hidden is None:
                break
            evicted = [columns["id"] for columns in _columns(folder, EVICTED, there, process)]
            hidden = torch.cat([hidden, *evicted]).unique()


def decayed_in(saved: Saved, table: str) -> float:
    """Return the sum of a table's decay at the moment that was saved; 0 if its rows did not decay. Raises
    TesseraError."""
    found = saved.training["tables"][table].get("decayed", 0.0)
    if not isinstance(found, float) or not found <= 0:
        raise TesseraError(f"{saved.name}: decayed of table {table} is {found!r}; expected a number of at most 0")
    return found


def _rows_to_reserve(folder: Storage, there: str, process: Process) -> int:
    """Return the rows to reserve for this rank: those of the full state that deltas build on, which has most."""
    paths = files_of(folder, ROWS, there, process)
    return sum(count_rows(folder, path, process.rank, process.world_size) for path in paths)


def _batches(
    table: OwnedTable,
    folder: Storage,
    there: str,
    process: Process,
    hidden: Tensor | None,
    kinds: dict[str, bool],
    decayed: float,
) -> Iterator[RowBatch]:
    """Yield the table's rows in a folder as batches to import. hidden: evicted ids of newer folders; None if the folder
    is the only one. kinds, decayed: the last arguments of `to_batch`."""
    expected = empty_columns(table)
    for path in files_of(folder, ROWS, there, process):
        for columns in read_columns(folder, path, process.rank, process.world_size):
            if hidden is not None:
                columns = _without(columns, table, hidden)
            yield to_batch(columns, expected, table, f"{folder.name}/{path}", **kinds, decayed=decayed)


def _without(columns: Columns, table: OwnedTable, hidden: Tensor) -> Columns:
    """Leave out rows that the table has already from a newer state, and those evicted since."""
    ids = columns["id"]
    known = table.lookup(ids.to(table.device), 0, training=False).cpu() >= 0
    chosen = (~known & ~torch.isin(ids, hidden, assume_unique=True)).nonzero().flatten()
    return {name: column.index_select(0, chosen) for name, column in columns.items()}


def _columns(folder: Storage, kind: str, table: str, process: Process) -> Iterator[Columns]:
    for path in files_of(folder, kind, table, process):
        yield from read_columns(folder, path, process.rank, process.world_size)


def load_pending(tables: Tables, saved: Saved, process: Process, name_there: Callable[[str], str] = str) -> None:
    """Let the exact admission filters go on with the counts of the ids that this rank owns."""
    for name, table in tables.items():
        for columns in _columns(saved.folders[0], PENDING, name_there(name), process):
            if columns["id"].numel():
                table.import_state({key: columns[c].to(table.device) for key, c in ADMISSION_COLUMNS.items()})


def load_table_state(tables: Tables, saved: Saved, by_rank: list[dict[str, Tensor]], process: Process) -> list[str]:
    """Take over what tables are besides rows. On another number of ranks row numbers, free rows and the walk of expiry
    begin anew, rank 0 goes on with everyone's counters, and sliding filters go on where they can.

    Args:
        by_rank: the `TableParts.state` of each rank that saved.

    Returns:
        what could not be taken over, as sentences.
    """
    lost = []
    for name, table in tables.items():
        states = [
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            for prefix in [f"table/{name}/"]
            for state in by_rank
        ]
        if saved.ranks == process.world_size:
            table.import_state(states[process.rank])
            continue
        counters = torch.stack([state["counters"] for state in states]).sum(0)
        kept: dict[str, Tensor] = {key: states[0][key] for key in ("step", "period") if key in states[0]}
        kept |= {"counters": counters if process.is_main else torch.zeros_like(counters)}
        if "admission/cells" in states[0]:
            if process.world_size % saved.ranks:
                lost.append(
                    f"table {name}: a sliding admission filter cannot go from {saved.ranks} to {process.world_size} "
                    "ranks; it begins to count anew"
                )
            else:  # the ids of this rank are among those of one rank that saved, in the same cells
                one = states[process.rank % saved.ranks]
                kept |= {key: value for key, value in one.items() if key.startswith("admission/")}
        table.import_state(kept)
    return lost
