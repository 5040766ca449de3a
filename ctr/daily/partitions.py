"""The partitions of a data set, days or hours: found by listing, known again by a fingerprint of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from tessera.ctr.config import Config
from tessera.ctr.daily.day_record import DayRecord
from tessera.ctr.data.day_folders import DayFolders, hour_of, is_inside, time_of
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.files import DataFile
from tessera.ctr.data.footers import THREADS
from tessera.ctr.data.lakes import table_at
from tessera.ctr.data.listing import MARKER, Listing, key_of_file, list_files
from tessera.ctr.data.seals import read_seal
from tessera.ctr.data.visible import STAGING, Entry, entries_below, holds_no_rows, refuse_half_written
from tessera.distributed.locations import filesystem_of, joined


class PartitionError(DataError):
    """Raised when a partition is missing, late, repeated, changed or unreadable. Nothing was trained with it."""


@dataclass(frozen=True)
class Partition:
    """One day or hour. key: 2026-01-01 or 2026-01-01T05; path: its folder or URI; marked: its marker is there, or
    none is asked for; written: a job is still writing it, or was killed."""

    key: str
    path: str
    marked: bool = True
    written: bool = False
    listing: Listing | None = None  # of a table that keeps a log of its files

    @property
    def source(self) -> str | Listing:
        """The listing, or the path, that `list_files` takes."""
        return self.listing or self.path

    @property
    def time(self) -> datetime:
        return time_of(self.key)


def find_partitions(
    root: str,
    first: str | None,
    last: str | None,
    folders: DayFolders = DayFolders(),  # noqa: B008
    marker: str | None = MARKER,
) -> list[Partition]:
    """Return the partitions below a folder or URI from `first` to `last` (a day includes its hours), in order of time.

    folders: how they are called. marker: the file that a complete one holds; None: all are complete.

    Raises:
        DataError: the folder cannot be listed. PartitionError, naming it: an entry that is neither a partition nor
        surely without rows, a partition that is there twice, a day that has hours and files of its own.
    """
    table = _days_of_table(root, folders)
    if table is not None:
        return [one for one in table if is_inside(one.key, first, last)]
    found: dict[str, Partition] = {}
    for key, path, entries in _days(root, folders, first, last):
        for partition in _partitions(key, path, entries, folders, marker):
            twin = found.setdefault(partition.key, partition)
            if twin is not partition:
                raise PartitionError(f"{partition.path}: is {partition.key}, and so is {twin.path}; expected it once")
    return sorted((p for p in found.values() if is_inside(p.key, first, last)), key=lambda p: p.key)


def _days_of_table(root: str, folders: DayFolders) -> list[Partition] | None:
    """The partitions of a table that keeps a log of its files, in order of time: its log says what is complete. None
    where the root is no such table."""
    filesystem, location = filesystem_of(root)
    if table_at(filesystem, location.rstrip("/")) is None:
        return None
    files: dict[str, list[DataFile]] = {}
    for file in list_files(root, folders=folders).files:
        files.setdefault(key_of_file(file, folders) or "", []).append(file)
    if "" in files:
        raise PartitionError(f"{files[''][0].path}: lies in no folder {folders} (data.partition)")
    return [Partition(key, joined(root, folders.folder_of(key)), listing=Listing(files[key])) for key in sorted(files)]


def _days(
    root: str, folders: DayFolders, first: str | None, last: str | None
) -> Iterator[tuple[str, str, list[Entry]]]:
    """Key, path and entries of each day's folder, or of each hour's where the format has hours."""
    level: list[tuple[str, list[str]]] = [(root, [])]
    for depth in range(folders.depth):
        below = []
        for path, names in level:
            entries = _entries(path)
            refuse_half_written(path, entries, MARKER)
            for entry in _visible(entries):
                name = entry.parts[-1]
                if entry.kind == "folder" and folders.values_of(depth, name) is not None:
                    below.append((joined(path, name), [*names, name]))
                else:
                    hint = f"{folders.hint([name])}; else "
                    _refuse_stray(path, entry, f"is no folder {folders} (data.partition)", hint)
        level = below
    for path, names in level:
        key = folders.key_of(names)
        if key is None:
            raise PartitionError(f"{path}: its name is no date; expected {folders} (data.partition)")
        if is_inside(key, first, last):
            yield key, path, _entries(path)


def _entries(path: str) -> list[Entry]:
    filesystem, location = filesystem_of(path)
    return entries_below(filesystem, location, path, deep=False)


def _visible(entries: list[Entry]) -> list[Entry]:
    return [entry for entry in entries if not holds_no_rows(entry, None)]


def _partitions(
    key: str, path: str, entries: list[Entry], folders: DayFolders, marker: str | None
) -> Iterator[Partition]:
    """The folder of a day or, where it has them, those of its hours. The marker of a day is that of its hours, too."""
    day = _seen(key, path, entries, marker)
    hours: dict[str, str] = {}
    for entry in _visible(entries) if not folders.has_hours else []:
        try:
            hour = hour_of(entry.name) if entry.kind == "folder" else None
        except DataError as error:
            raise PartitionError(f"{path}: {error}") from None
        if hour is not None:
            hours[entry.name] = hour
    if not hours:
        yield day
        return
    for entry in _visible(entries):
        if entry.name not in hours and entry.name != marker:
            _refuse_stray(path, entry, "lies beside hours and is none, and the day is read by its hours", "")
    for name, hour in hours.items():
        where = joined(path, name)
        one = _seen(f"{key}T{hour}", where, _entries(where) if marker is not None else [], marker)
        yield replace(one, marked=one.marked or day.marked, written=one.written or day.written)


def _seen(key: str, path: str, entries: list[Entry], marker: str | None) -> Partition:
    names = {entry.name for entry in entries}
    return Partition(key, path, marker is None or marker in names, STAGING in names and marker not in names)


def _refuse_stray(path: str, entry: Entry, problem: str, hint: str) -> None:
    """Raises PartitionError for what would not be read, unless it is an empty folder."""
    where = joined(path, entry.name)
    if entry.kind != "folder" or _visible(_entries(where)):
        raise PartitionError(f"{where}: {problem}; {hint}move it away, or begin its name with _")


def sources_of(config: Config, keys: Sequence[str]) -> list[str | Listing]:
    """Return the sources to list for some partitions. Raises PartitionError for one that is not there any more."""
    folders = DayFolders.of(config.data.partition)
    found = {one.key: one for one in find_partitions(config.data.path, min(keys), max(keys), folders, None)}
    for key in keys:
        if key not in found:
            raise PartitionError(f"{config.data.path}: {key} is not there any more; expected {folders.folder_of(key)}")
    return [found[key].source for key in keys]


def fingerprint(partition: Partition, marker: str | None = MARKER) -> str:
    """Return 16 hex digits over the names below the partition, sizes and footers of its parquet files
    (ctr/data/seals.py).

    Raises PartitionError for a partition without rows, and for a file without a whole footer.
    """
    try:
        files = list_files(partition.source, marker=marker).files
        with ThreadPoolExecutor(min(THREADS, len(files)), "footer") as pool:
            seals = list(pool.map(read_seal, files))
        if not sum(seal.metadata.num_rows for seal in seals):
            raise DataError(f"{partition.path}: found 0 rows in {len(files)} files, expected some")
    except DataError as error:
        raise PartitionError(f"{error}; daily.skip=[{partition.key}] passes {partition.key} over") from None
    digest = hashlib.sha256()
    for file, seal in zip(files, seals, strict=True):
        digest.update(f"{file.name}\0{seal.size}\0{seal.checksum}\0".encode())
    return digest.hexdigest()[:16]


def period_of(keys: Iterable[str], hours: int | None) -> timedelta:
    """From one partition to the next: as configured, else an hour where partitions are hours, else a day."""
    if hours is None:
        hours = 1 if any("T" in key for key in keys) else 24
    return timedelta(hours=hours)


def key_behind(key: str, period: timedelta) -> str:
    """Return the key of the partition that follows."""
    return (time_of(key) + period).strftime("%Y-%m-%dT%H" if "T" in key else "%Y-%m-%d")


def is_last(newest: str | None, last: str | None, period: timedelta) -> bool:
    """Return whether nothing up to `last` (a day includes its hours) can follow the newest partition."""
    return newest is not None and last is not None and not is_inside(key_behind(newest, period), None, last)


def order(
    found: Sequence[Partition], done: Sequence[str], skip: Collection[str], period: timedelta
) -> list[tuple[str, Partition | None]]:
    """The partitions that are due, in order; those that `skip` names may be late, or missing (None).

    found: in order. done: keys of partitions, in order.

    Raises PartitionError: the first that is late or missing.
    """
    newest = done[-1] if done else None
    due: list[tuple[str, Partition | None]] = []
    expected = newest and key_behind(newest, period)
    for partition in found:
        key = partition.key
        if key in done:
            continue
        if newest is not None and key < newest:
            if key not in skip:
                raise PartitionError(
                    f"{partition.path} is late: {newest} is done, and {key} never was; daily.skip=[{key}] passes it "
                    "over, daily.from leaves out what is older, daily.rollback_to goes back behind it"
                )
        elif expected is not None:
            while expected < key and expected in skip:
                due.append((expected, None))
                expected = key_behind(expected, period)
            if key != expected:
                raise PartitionError(
                    f"{expected} is missing: found {key}, expected a partition every "
                    f"{period.total_seconds() / 3600:g} hours; daily.skip=[{expected}] passes it over"
                )
        due.append((key, partition))
        if newest is None or key > newest:
            expected = key_behind(key, period)
    while expected is not None and expected in skip:
        due.append((expected, None))
        expected = key_behind(expected, period)
    return due


def check_content(key: str, path: str, found: str, records: Iterable[DayRecord]) -> None:
    """Refuse a partition that was done with other content, or whose content was done under another name.

    Raises PartitionError.
    """
    for record in records:
        if record.partition == key and record.fingerprint not in (None, found):
            raise PartitionError(
                f"{path} has changed since it was {record.stage.value}: fingerprint {found}, then {record.fingerprint}"
            )
        if record.partition != key and record.fingerprint == found:
            raise PartitionError(
                f"{path} repeats {record.partition}: both have the fingerprint {found}; daily.skip=[{key}] "
                "passes it over"
            )
