"""The parquet files of a data set: where they lie and how they are opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from ctr.data.errors import DataError
from ctr.data.schema import nearest
from distributed.locations import filesystem_of, joined

SUFFIXES = (".parquet", ".parq", ".pq")


@dataclass(frozen=True)
class DataFile:
    """One parquet file. `name` is relative to the folder that was listed, `path` is for messages."""

    name: str
    path: str
    filesystem: pa.fs.FileSystem
    location: str  # inside the filesystem

    @property
    def remote(self) -> bool:
        return not isinstance(self.filesystem, pa.fs.LocalFileSystem)

    def open(self, **options) -> pq.ParquetFile:
        """Options are those of `pyarrow.parquet.ParquetFile`."""
        return pq.ParquetFile(self.filesystem.open_input_file(self.location), **options)


def list_files(paths: str | list[str], days: list[str] | None = None) -> list[DataFile]:
    """The parquet files under folders, files or URIs, sorted by name inside each.

    Files and folders whose names begin with `_` or `.` are passed over. `days` keeps the partitions
    `day=YYYY-MM-DD`. Raises DataError for a missing path, a folder without parquet files, a day without
    files and a file listed twice.
    """
    files: list[DataFile] = []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        files += _list_path(str(path))
    if days is not None:
        files = _select_days(files, days, paths)
    seen: set[str] = set()
    for file in files:
        if file.location in seen:
            raise DataError(f"{file.path}: listed twice; its rows would count double")
        seen.add(file.location)
    if not files:
        raise DataError(f"{paths}: found no path, expected a folder with parquet files")
    return files


def _list_path(path: str) -> list[DataFile]:
    filesystem, location = filesystem_of(path)
    try:
        info = filesystem.get_file_info(location)
        if info.type == pa.fs.FileType.NotFound:
            raise DataError(f"{path}: not found, expected a folder with parquet files or a parquet file")
        if info.type == pa.fs.FileType.File:
            return [DataFile(os.path.basename(location), path, filesystem, location)]
        found = filesystem.get_file_info(pa.fs.FileSelector(location, recursive=True))
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None
    files = []
    root = location.strip("/")
    for info in found:
        name = info.path.strip("/")[len(root) :].strip("/")
        hidden = any(part[0] in "_." for part in name.split("/") if part)
        if info.type == pa.fs.FileType.File and name.endswith(SUFFIXES) and not hidden:
            files.append(DataFile(name, joined(path, name), filesystem, info.path))
    if not files:
        raise DataError(f"{path}: found no parquet file, expected files ending in {' '.join(SUFFIXES)}")
    return sorted(files, key=lambda file: file.name)


def _select_days(files: list[DataFile], days: list[str], paths: str | list[str]) -> list[DataFile]:
    by_day: dict[str, list[DataFile]] = {}
    for file in files:
        match = re.search(r"(?:^|/)day=([^/]+)/", f"/{file.path}")
        if match:
            by_day.setdefault(match[1], []).append(file)
    for day in days:
        if day not in by_day:
            raise DataError(f"{paths}: found no folder day={day}; {nearest(day, sorted(by_day))}")
    return [file for file in files if any(file in by_day[day] for day in days)]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
