"""List the files of a data set: folders, files, patterns and URIs, with all their days or some.

`visible.py` has the rule that says what is read, `lakes.py` reads the tables that keep a log of their files.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import pyarrow as pa
import pyarrow.fs

from tessera.ctr.data.day_folders import DayFolders, hour_of
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.files import DataFile, one_line
from tessera.ctr.data.lakes import keep_live, refuse_removed
from tessera.ctr.data.schema import nearest
from tessera.ctr.data.visible import SUFFIXES, Entry, entries_below, folders_above, is_hidden, is_passed_over, sort_out
from tessera.distributed.locations import filesystem_of, joined

MARKER = "_SUCCESS"
WILD = re.compile(r"[*?[]")
COLUMN_VALUE = re.compile(r"[^=/]+=[^/]*")


@dataclass(frozen=True)
class Listing:
    """The files below one or several paths. passed_over: names, for messages, of skipped entries that hold no rows."""

    files: list[DataFile]
    passed_over: list[str] = field(default_factory=list)
    marked: frozenset[str] = frozenset()  # folders that hold the marker, as places inside the file system


def list_files(
    paths: str | Listing | Sequence[str | Listing],
    days: list[str] | None = None,
    folders: DayFolders = DayFolders(),  # noqa: B008
    marker: str | None = MARKER,
) -> Listing:
    """Return the parquet files of folders, files, patterns (`*`, `?`, `[…]`, `**`) or URIs, in order of time and name
    in each.

    Args:
        days: keys of the days and hours to keep; a day includes its hours. None: all files, whatever their folders.
        folders: how folders of days are called.
        marker: the file that says that a folder is complete, wherever others like it have one; None: nothing does.

    Raises DataError, in one line that names it: a path that is missing, an entry that is neither read nor surely
    without rows, a day without a folder, a folder without its marker, and a file that is listed twice.
    """
    listings = [
        path if isinstance(path, Listing) else _list_path(str(path), folders, marker)
        for path in ([paths] if isinstance(paths, (str, os.PathLike, Listing)) else paths)
    ]
    files = [file for listing in listings for file in listing.files]
    shown = paths if not isinstance(paths, Listing) else "the data set"
    marked = frozenset().union(*(listing.marked for listing in listings))
    _refuse_unmarked(files, days, marked, folders, marker)
    if days is not None:
        files = _select_days(files, days, shown, folders)
    if not files:
        raise DataError(f"{shown}: found no path, expected a folder with parquet files")
    _refuse_doubled(files)
    return Listing(files, [name for listing in listings for name in listing.passed_over], marked)


def _list_path(path: str, folders: DayFolders, marker: str | None) -> Listing:
    is_pattern = bool(WILD.search(path.partition("?")[0] if "://" in path else path))
    if is_pattern and "://" in path:
        return _list_pattern(path, folders, marker)
    filesystem, location = filesystem_of(path)
    kind = kind_of(filesystem, location, path)
    if kind == pa.fs.FileType.File:
        refuse_removed(filesystem, location, path)
        return Listing([DataFile(os.path.basename(location), path, filesystem, location)])
    if kind == pa.fs.FileType.Directory:
        return _list_folder(path, filesystem, location, folders, marker)
    if kind == pa.fs.FileType.NotFound and is_pattern:
        return _list_pattern(path, folders, marker)
    what = "not found" if kind == pa.fs.FileType.NotFound else "is neither a file nor a folder"
    raise DataError(f"{path}: {what}, expected a folder with parquet files or a parquet file")


def kind_of(filesystem: pa.fs.FileSystem, location: str, path: str) -> pa.fs.FileType:
    """Return the file type at a location. Raises DataError, naming `path`, if it cannot be determined."""
    try:
        return filesystem.get_file_info(location).type
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def _list_folder(
    path: str,
    filesystem: pa.fs.FileSystem,
    location: str,
    folders: DayFolders,
    marker: str | None,
    pattern: str | None = None,
) -> Listing:
    """List a folder. pattern: keep what it matches below the folder, and what lies below a match."""
    entries, chosen = keep_live(filesystem, location, path, entries_below(filesystem, location, path))
    if pattern is not None:
        entries, named = _matching(entries, pattern)
        chosen |= named
    names = sort_out(path, entries, marker, chosen)
    passed = sorted({_outermost(entry) for entry in entries if is_passed_over(entry, marker)})
    if not names:
        where = path if pattern is None else joined(path, pattern)
        beside = f" beside {passed[0]}" if passed else ""
        raise DataError(f"{where}: found no parquet file{beside}, expected files ending in {' '.join(SUFFIXES)}")
    root = location.rstrip("/")
    marked = frozenset(os.path.dirname(f"{root}/{entry.name}") for entry in entries if entry.parts[-1] == marker)
    found = [DataFile(name, joined(path, name), filesystem, f"{root}/{name}") for name in names]
    found.sort(key=lambda file: _place(file.name, folders))
    return Listing(found, [joined(path, name) for name in passed], marked)


def _list_pattern(path: str, folders: DayFolders, marker: str | None) -> Listing:
    """List files and folders whose names match, starting at the last folder that the path names without wildcards."""
    scheme, between, rest = path.rpartition("://")
    rest, mark, query = rest.partition("?") if scheme else (rest, "", "")
    parts = rest.split("/")
    plain = next(i for i, part in enumerate(parts) if WILD.search(part))
    base = "/".join(parts[:plain]) or ("/" if rest.startswith("/") else ".")
    base = f"{scheme}{between}{base}{mark}{query}"
    filesystem, location = filesystem_of(base)
    if kind_of(filesystem, location, base) != pa.fs.FileType.Directory:
        raise DataError(f"{path}: found no folder {base}, expected one with parquet files")
    return _list_folder(base, filesystem, location, folders, marker, "/".join(parts[plain:]))


def _matching(entries: list[Entry], pattern: str) -> tuple[list[Entry], set[str]]:
    """Return the entries that match a pattern or lie below a match, with the markers beside them; and the names of
    matched files whose suffix the pattern spells out."""
    levels, suffix = pattern.rstrip("/").split("/"), os.path.splitext(pattern)[1]
    matched = {entry.name for entry in entries if _matches(entry.parts, levels)}
    kept = [entry for entry in entries if matched.intersection([*folders_above(entry.name), entry.name])]
    beside = {os.path.dirname(entry.name) for entry in kept if entry.kind == "file"}
    names = {entry.name for entry in kept}
    for entry in entries:
        hidden = _outermost(entry)
        if entry.name not in names and is_hidden(os.path.basename(hidden)) and os.path.dirname(hidden) in beside:
            kept.append(entry)
    return kept, {name for name in matched if suffix and os.path.splitext(name)[1] == suffix}


def _matches(parts: list[str], levels: list[str]) -> bool:
    """Return whether the folders match the pattern level by level; `**` matches any number of them. Hidden ones must be
    named."""
    if not levels or not parts:
        return not levels and not parts
    hidden = is_hidden(parts[0])
    if levels[0] == "**":
        return _matches(parts, levels[1:]) or (not hidden and _matches(parts[1:], levels))
    named = not hidden or levels[0][0] in "._"
    return named and fnmatch.fnmatchcase(parts[0], levels[0]) and _matches(parts[1:], levels[1:])


def _outermost(entry: Entry) -> str:
    """Return an entry that is passed over, or the hidden folder that contains it."""
    hidden = next((i for i, part in enumerate(entry.parts) if is_hidden(part)), len(entry.parts) - 1)
    return "/".join(entry.parts[: hidden + 1])


def _place(name: str, folders: DayFolders) -> tuple[str, str]:
    """Return the sort key of a name: names sort as text, but days and hours without leading zeros sort in order of
    time."""
    parts = name.split("/")
    try:
        found = folders.find(parts[:-1])
        hour = [hour_of(part) for part in parts[:-1]]
    except DataError:  # an hour that is none: it keeps the place of its name where nobody asks for days
        return name, name
    if found is not None:
        begin, key = found
        parts[begin : begin + folders.depth] = folders.folder_of(key[:10] if not folders.has_hours else key).split("/")
    parts[:-1] = [f"hour={one}" if one else part for one, part in zip(hour, parts[:-1], strict=True)]
    return "/".join(parts), name


def key_of_file(file: DataFile, folders: DayFolders) -> str | None:
    """Return the key of a file's day or hour, by the folders below the listed one, or else by those above it."""
    below = file.name.split("/")[:-1]
    try:
        found = folders.find(below) or folders.find(file.location.split("/")[:-1])
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from None
    return found and found[1]


def _select_days(files: list[DataFile], days: list[str], paths: object, folders: DayFolders) -> list[DataFile]:
    """Return the files of some days, and of those hours that are named."""
    keys = [key_of_file(file, folders) for file in files]
    outside = [file for file, key in zip(files, keys, strict=True) if key is None]
    known = {key for key in keys if key} | {key[:10] for key in keys if key}
    if not known:
        names = sorted({folder for file in files for folder in file.location.split("/")[:-1]})
        raise DataError(f"{paths}: data.days is set and no folder is called {folders}; {folders.hint(names)}")
    if outside:
        raise DataError(
            f"{outside[0].path}: data.days is set, and this file lies in no folder {folders}; move it to its day"
        )
    for day in days:
        if day not in known:
            raise DataError(f"{paths}: found no folder {folders.folder_of(day)}; {nearest(day, sorted(known))}")
    wanted = set(days)
    pairs = zip(files, keys, strict=True)
    return [file for file, key in pairs if key is not None and (key in wanted or key[:10] in wanted)]


def _refuse_doubled(files: Iterable[DataFile]) -> None:
    seen: dict[object, DataFile] = {}
    for file in files:
        here: object = file.location
        if not file.remote:
            try:
                status = os.stat(file.location)
                here = (status.st_dev, status.st_ino)  # the same file through a link, too
            except OSError:
                pass  # opening it will say
        first = seen.setdefault(here, file)
        if first is not file:
            same = "" if first.path == file.path else f", first as {first.path}"
            raise DataError(f"{file.path}: listed twice{same}; its rows would count double")


def _refuse_unmarked(
    files: list[DataFile], days: list[str] | None, marked: frozenset[str], folders: DayFolders, marker: str | None
) -> None:
    """Raise DataError for a partition folder without the marker if folders like it have one."""
    if not marked:
        return
    kind = cache(lambda folder: _kind(folder, folders))
    kinds = {kind(folder) for folder in marked} - {None}
    for file in files if kinds else []:
        like = [folder for folder in folders_above(file.location) if kind(folder) in kinds]
        if not like or marked.intersection(like):
            continue
        if days is not None and not _is_asked_for(file, days, folders):
            continue
        raise DataError(
            f"{file.path}: its folder {os.path.basename(like[-1])} holds no {marker}, and others do, so it may be half "
            f"written; wait for its writer, or put a file {marker} into it if it is complete"
        )


def _is_asked_for(file: DataFile, days: list[str], folders: DayFolders) -> bool:
    key = key_of_file(file, folders)
    return key is not None and (key in days or key[:10] in days)


def _kind(folder: str, folders: DayFolders) -> tuple[str, ...] | None:
    """Return the columns in the names of a partition folder, which folders of one kind share; None for other
    folders."""
    parts = folder.split("/")
    columns = tuple(part.split("=")[0] for part in parts if COLUMN_VALUE.fullmatch(part))
    if COLUMN_VALUE.fullmatch(parts[-1]):
        return columns
    is_day = folders.key_of(parts[-folders.depth :]) is not None
    return (*columns, str(folders)) if is_day else None
