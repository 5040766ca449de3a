"""Decide which entries below a path are data: the one rule for splits, days, hours, replayed rows and samples.

Every visible entry is read as parquet or ends the job in a line that names it. Only what surely holds no rows is passed
over: markers, checksums, descriptions, and names that begin with `.` or `_`, which every writer and reader of such
folders takes for hidden. A folder `_column=value` is visible, as it is to Spark.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import pyarrow.fs as fs

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.files import one_line
from tessera.distributed.locations import joined

SUFFIXES = (".parquet", ".parq", ".pq")
# Names without a dot, or with the name of a codec alone, are what Hive (000000_0) and Athena (…_00001.gz) write; the
# footer says whether they are parquet.
CODECS = (".gz", ".gzip", ".snappy", ".zst", ".zstd", ".lz4", ".br")
CHECKSUMS = (".crc", ".md5", ".sha1", ".sha256")
DESCRIPTIONS = ("schema.yaml", "prepare.json", "teacher.json")  # of scripts/prepare.py
PAPERS = tuple(name + suffix for name in ("readme", "license", "notice") for suffix in ("", ".md", ".txt", ".rst"))
# A job of Hadoop or Spark writes here and removes the folder at its end. Some of them put files beside it before that.
STAGING = "_temporary"


@dataclass(frozen=True)
class Entry:
    """A file or folder below a path. name: relative to the path, with `/`. kind: file, folder, or what else it is."""

    name: str
    kind: str

    @property
    def parts(self) -> list[str]:
        return self.name.split("/")


def entries_below(filesystem: fs.FileSystem, location: str, path: str, *, deep: bool = True) -> list[Entry]:
    """Return all entries below a folder, sorted by name; not deep: those directly in it. On local disks hidden folders
    are not entered, and no link is followed in a circle.

    Raises DataError, naming `path`, where it cannot be listed.
    """
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            found = list(_walk(location, "", (), deep=deep))
        else:
            found = _listed(filesystem, location, deep=deep)
    except OSError as error:
        raise DataError(f"{path}: {one_line(error)}") from None
    return sorted(found, key=lambda entry: entry.name)


def _listed(filesystem: fs.FileSystem, location: str, *, deep: bool) -> list[Entry]:
    kinds = {fs.FileType.File: "file", fs.FileType.Directory: "folder"}
    root = len(location.strip("/"))
    infos = filesystem.get_file_info(fs.FileSelector(location, recursive=deep))
    return [Entry(info.path.strip("/")[root:].strip("/"), kinds.get(info.type, "neither")) for info in infos]


def _walk(folder: str, name: str, above: tuple[str, ...], *, deep: bool) -> Iterable[Entry]:
    """Yield the entries below a local folder. Arrow's own listing leaves out links that lead nowhere, and goes round in
    circles."""
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as children:
        for child in children:
            below = f"{name}{child.name}"
            if child.is_dir():
                yield Entry(below, "folder")
                if deep and not is_hidden(child.name) and os.path.realpath(child.path) not in above:
                    yield from _walk(child.path, f"{below}/", above, deep=deep)
            elif child.is_file():
                yield Entry(below, "file")
            else:
                yield Entry(below, "a link that leads nowhere" if child.is_symlink() else "neither file nor folder")


def is_hidden(part: str) -> bool:
    """Return whether an entry of this name is hidden by the convention of Spark, Hive and similar tools."""
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def is_passed_over(entry: Entry, marker: str | None) -> bool:
    """Return whether an entry is skipped and should be reported. A visible folder is not: its content is examined."""
    return holds_no_rows(entry, marker) and (entry.kind != "folder" or is_hidden(entry.parts[-1]))


def holds_no_rows(entry: Entry, marker: str | None) -> bool:
    """Return whether an entry certainly holds no rows that count."""
    name = entry.parts[-1]
    return (
        any(is_hidden(part) for part in entry.parts)
        or (entry.kind == "file" and name == marker)
        or name.endswith((*CHECKSUMS, "_$folder$"))
        or name in DESCRIPTIONS
        or name.lower() in PAPERS
    )


def sort_out(path: str, entries: Iterable[Entry], marker: str | None, chosen: Collection[str] = ()) -> list[str]:
    """Return the names of the files that hold rows; the other files are passed over.

    marker: the name of the file that says that a folder is complete. chosen: names that the user asked for as they are,
    which may end as they like.

    Raises DataError, in one line, for the first entry that can neither be read nor passed over.
    """
    entries = list(entries)
    refuse_half_written(path, entries, marker)
    names, strange = [], []
    for entry in entries:
        if entry.kind == "folder" or holds_no_rows(entry, marker):
            continue
        if entry.kind != "file":
            raise DataError(f"{joined(path, entry.name)}: is {entry.kind}; expected a file; remove it or mend it")
        if looks_like_parquet(entry.parts[-1]) or entry.name in chosen:
            names.append(entry.name)
        else:
            strange.append(entry.name)
    if strange:
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise DataError(
            f"{joined(path, strange[0])}{more}: found a visible file that is not named as parquet is "
            f"({' '.join(SUFFIXES)} or no suffix), expected to read every one; move it away, "
            "rename it, or choose files by a pattern such as "
            f"{joined(path, '*' + SUFFIXES[0])}"
        )
    return names


def looks_like_parquet(name: str) -> bool:
    """Return whether a file is read because of its name; its footer decides in the end. `part-0.parquet.bak` is left
    out, as it would count rows twice."""
    stem, suffix = os.path.splitext(name.lower())
    return suffix in SUFFIXES or not suffix or (suffix in CODECS and "." not in stem)


def refuse_half_written(path: str, entries: Iterable[Entry], marker: str | None) -> None:
    """Raise DataError for a folder in which a job still writes, or was killed, and for one that a stream writes."""
    entries = list(entries)
    names = {entry.name for entry in entries}
    for entry in entries:
        for place, part in enumerate(entry.parts):
            where = joined(path, *entry.parts[: place + 1])
            if part == STAGING and (marker is None or "/".join([*entry.parts[:place], marker]) not in names):
                raise DataError(
                    f"{where}: a job that writes here has not ended, so its folder may be half written; wait for it, "
                    "or remove what a killed one has left"
                )
            if part.endswith("._COPYING_"):
                raise DataError(f"{where}: is still being copied; wait for it, or remove what a killed copy has left")
            if part == "_spark_metadata":
                raise DataError(
                    f"{where}: Spark's log says which files of this stream count; write them anew where there is no "
                    "such log: spark.read.parquet(…).write.parquet(…)"
                )


def folders_above(name: str) -> list[str]:
    """Return the folders that contain an entry, outermost first: a/b/c gives a and a/b."""
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]
