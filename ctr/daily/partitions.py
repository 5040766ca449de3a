"""The partitions of a data set, days or hours: found by listing, known again by a fingerprint of their content."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta

import pyarrow as pa
import pyarrow.fs

from ctr.data.errors import DataError
from ctr.data.files import DataFile, list_files, one_line
from ctr.data.footers import THREADS
from distributed.locations import filesystem_of, joined
from embedding.errors import ConfigError

DAY = re.compile(r"day=(\d{4}-\d\d-\d\d)")
HOUR = re.compile(r"hour=(\d\d)")
KEY = re.compile(r"\d{4}-\d\d-\d\d(T\d\d)?")
PARQUET_END = b"PAR1"
SMALL_BYTES = 1 << 20


class PartitionError(DataError):
    """A partition is missing, late, repeated, changed or unreadable. Nothing was trained with it."""


@dataclass(frozen=True)
class Partition:
    """One day or hour. key: 2026-01-01 or 2026-01-01T05; path: its folder or URI."""

    key: str
    path: str

    @property
    def time(self) -> datetime:
        return time_of(self.key)


def time_of(key: str) -> datetime:
    return datetime.strptime(key, "%Y-%m-%dT%H" if "T" in key else "%Y-%m-%d")


def check_key(key: str, name: str) -> str:
    """Raises ConfigError, naming the configuration's key, for what is neither a date nor an hour."""
    try:
        if KEY.fullmatch(key) and time_of(key):
            return key
    except ValueError:
        pass
    raise ConfigError(f"{name} is {key!r}; expected a day as 2026-01-31 or an hour as 2026-01-31T05")


def find_partitions(root: str, first: str | None, last: str | None, marker: str | None = None) -> list[Partition]:
    """The partitions below a folder or URI from `first` to `last` (a day includes its hours), in order of time.

    marker: leave out partitions without a file of this name.

    Raises:
        DataError: the folder cannot be listed. PartitionError: a day that has hours and files of its own.
    """
    filesystem, location = filesystem_of(root)
    found = []
    for day, names in _days(filesystem, location, root).items():
        if _inside(day, first, last):
            found += _partitions(filesystem, f"{location.rstrip('/')}/{names}", joined(root, names), day, marker)
    return sorted((p for p in found if _inside(p.key, first, last)), key=lambda p: p.key)


def _inside(key: str, first: str | None, last: str | None) -> bool:
    """A day is inside if some of its hours may be."""
    after = first is None or key >= first[: len(key)]
    return after and (last is None or key[: len(last)] <= last)


def _days(filesystem: pa.fs.FileSystem, location: str, root: str) -> dict[str, str]:
    found = {}
    for name, is_folder in _list(filesystem, location, root):
        match = DAY.fullmatch(name)
        if match and is_folder:
            found[check_key(match[1], f"{root}: the folder of a day")] = name
    return found


def _partitions(
    filesystem: pa.fs.FileSystem, location: str, path: str, day: str, marker: str | None
) -> list[Partition]:
    children = _list(filesystem, location, path)
    hours = {match[1]: name for name, is_folder in children if is_folder and (match := HOUR.fullmatch(name))}
    names = [name for name, _ in children]
    if not hours:
        return [Partition(day, path)] if marker is None or marker in names else []
    own = [name for name, is_folder in children if not is_folder and name[0] not in "_."]
    if own:
        raise PartitionError(f"{path}: found hours and beside them {own[0]}; expected one or the other")
    complete = [
        (hour, name)
        for hour, name in hours.items()
        if marker is None or marker in [one for one, _ in _list(filesystem, f"{location}/{name}", joined(path, name))]
    ]
    return [Partition(f"{day}T{hour}", joined(path, name)) for hour, name in complete]


def _list(filesystem: pa.fs.FileSystem, location: str, path: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what lies directly in a folder."""
    try:
        infos = filesystem.get_file_info(pa.fs.FileSelector(location))
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None
    return [(info.base_name, info.type == pa.fs.FileType.Directory) for info in infos]


def folder_of(root: str, key: str) -> str:
    """Where a partition lies below the data set's root."""
    day, _, hour = key.partition("T")
    return joined(root, f"day={day}", *([f"hour={hour}"] if hour else []))


def fingerprint(partition: Partition) -> str:
    """16 hex digits over the names below the partition, sizes and footers of its parquet files.

    Footers hold the place, the stored size and the statistics of every column of every row group. In a small file these
    can agree by chance where values differ, so files of up to `SMALL_BYTES` count whole; data of others are not read.

    Raises PartitionError for a file without a whole footer, DataError where there are no files.
    """
    files = list_files(partition.path)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(THREADS, len(files)), "footer") as pool:
        for file, (size, footer) in zip(files, pool.map(_seal, files), strict=True):
            digest.update(f"{file.name}\0{size}\0{footer}\0".encode())
    return digest.hexdigest()[:16]


def _seal(file: DataFile) -> tuple[int, str]:
    """Size of a parquet file, and a checksum of its footer, or of all of a small one."""
    try:
        with file.filesystem.open_input_file(file.location) as stream:
            size = stream.size()
            stream.seek(max(0, size - 8))
            tail = stream.read(8)
            length = struct.unpack("<I", tail[:4])[0] if len(tail) == 8 else 0
            if tail[4:] != PARQUET_END or length + 12 > size:
                raise PartitionError(f"{file.path}: no readable parquet footer in its {size:,} bytes")
            begin = 0 if size <= SMALL_BYTES else size - 8 - length
            stream.seek(begin)
            return size, hashlib.sha256(stream.read(size - begin)).hexdigest()
    except OSError as error:
        raise PartitionError(f"{file.path}: {one_line(error)}") from None


def period_of(keys: Iterable[str], hours: int | None) -> timedelta:
    """From one partition to the next: as configured, else an hour where partitions are hours, else a day."""
    if hours is None:
        hours = 1 if any("T" in key for key in keys) else 24
    return timedelta(hours=hours)


def key_behind(key: str, period: timedelta) -> str:
    """The key of the partition that follows."""
    return (time_of(key) + period).strftime("%Y-%m-%dT%H" if "T" in key else "%Y-%m-%d")


def is_last(newest: str | None, last: str | None, period: timedelta) -> bool:
    """Whether nothing up to `last` (a day includes its hours) can follow the newest partition."""
    return newest is not None and last is not None and not _inside(key_behind(newest, period), None, last)


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


def check_content(key: str, path: str, found: str, records: Iterable[Mapping]) -> None:
    """Refuse a partition that was done with other content, or whose content was done under another name.

    Raises PartitionError.
    """
    for record in records:
        if record["partition"] == key and record["fingerprint"] not in (None, found):
            raise PartitionError(
                f"{path} has changed since it was {record['status']}: fingerprint {found}, then {record['fingerprint']}"
            )
        if record["partition"] != key and record["fingerprint"] == found:
            raise PartitionError(
                f"{path} repeats {record['partition']}: both have the fingerprint {found}; daily.skip=[{key}] "
                "passes it over"
            )
