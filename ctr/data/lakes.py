"""List the live files of tables with a log: Delta and Iceberg through their libraries; Hudi is refused by name.

The folder of such a table also holds files that its log has removed or never accepted. Which files count is what the
library says of the newest version; they are then read as any parquet file is. The log is read through this project's
own file systems, so that a table lies wherever a plain folder may lie.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow.fs as fs

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.files import one_line
from tessera.ctr.data.visible import Entry, is_hidden
from tessera.distributed.locations import joined

if TYPE_CHECKING:  # most installations have no such tables
    from deltalake import DeltaTable

DELTA, ICEBERG, HUDI = "Delta", "Iceberg", "Hudi"
LOG_FOLDERS = {"_delta_log": DELTA, ".hoodie": HUDI}
ICEBERG_FOLDER, ICEBERG_DATA = "metadata", "data"
ICEBERG_VERSION = re.compile(r"v?(\d+)\S*\.metadata\.json")
LEVELS_ABOVE = 6
#: Features of Delta tables that leave a live file a plain parquet file with the columns that it names.
PLAIN_FEATURES = {"deletionVectors", "columnMapping", "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck",
                  "appendOnly", "invariants"}  # fmt: skip
INSTALL = "install it with: pip install --no-deps -r requirements/lakes.txt"


def keep_live(
    filesystem: fs.FileSystem, location: str, path: str, entries: list[Entry]
) -> tuple[list[Entry], set[str]]:
    """Return entries without those that logs of tables have removed, and the names of files that logs list, which may
    end as they like.

    Raises DataError, naming the table: one that cannot be read as plain files, or whose library is not installed.
    """
    root = location.rstrip("/")
    above = table_above(filesystem, root)
    tables = [above] if above else [(f"{root}/{name}".rstrip("/"), kind) for name, kind in _tables_in(entries)]
    chosen: set[str] = set()
    for place, kind in tables:
        shown = path if place == root else joined(path, place[len(root) + 1 :]) if place.startswith(root) else place
        live = {f"{place}/{name}" for name in _live_files(filesystem, place, kind, shown)}
        inside = {one for one in live if one.startswith(f"{root}/")}
        here = {f"{root}/{entry.name}": entry for entry in entries}
        for one in sorted(inside - set(here)):
            raise DataError(f"{shown}: the {kind} table lists {one[len(place) + 1 :]}, and there is no such file")
        entries = [
            entry
            for name, entry in here.items()
            if not name.startswith(f"{place}/") or name in live or _is_plain_folder(entry)
        ]
        chosen |= {here[one].name for one in inside}
    return entries, chosen


def _is_plain_folder(entry: Entry) -> bool:
    return entry.kind == "folder" and not any(is_hidden(part) for part in entry.parts)


def refuse_removed(filesystem: fs.FileSystem, location: str, path: str) -> None:
    """Raise DataError for a file in the folder of a table whose log does not list it."""
    table = table_above(filesystem, location)
    if table is not None and location[len(table[0]) + 1 :] not in _live_files(filesystem, *table, path):
        raise DataError(f"{path}: is not among the files of the {table[1]} table that it lies in; its log removed it")


def table_above(filesystem: fs.FileSystem, location: str) -> tuple[str, str] | None:
    """Return place and kind of the table that contains a place, itself not counted. Over a network only the folders
    behind those of partitions are examined."""
    local = isinstance(filesystem, fs.LocalFileSystem)
    child = location
    for _ in range(LEVELS_ABOVE):
        folder = os.path.dirname(child)
        name = os.path.basename(child)
        if folder in ("", "/", child) or not (local or child == location or "=" in name or name == ICEBERG_DATA):
            return None
        kind = table_at(filesystem, folder)
        if kind is not None:
            return folder, kind
        child = folder
    return None


def table_at(filesystem: fs.FileSystem, folder: str) -> str | None:
    """Return the kind of the table in this folder."""
    kinds = {**LOG_FOLDERS, ICEBERG_FOLDER: ICEBERG}
    try:
        found = filesystem.get_file_info([f"{folder}/{name}" for name in kinds])
    except OSError:  # a folder that may not be looked into says so when its files are listed
        return None
    for info, kind in zip(found, kinds.values(), strict=True):
        if info.type == fs.FileType.Directory and (kind != ICEBERG or _newest_metadata(filesystem, folder)):
            return kind
    return None


def _tables_in(entries: list[Entry]) -> list[tuple[str, str]]:
    """Return the folder and kind of each table, sorted by folder."""
    found: dict[str, str] = {}
    for entry in entries:
        parts = entry.parts
        for place, part in enumerate(parts):
            if part in LOG_FOLDERS:
                found["/".join(parts[:place])] = LOG_FOLDERS[part]
        if len(parts) > 1 and parts[-2] == ICEBERG_FOLDER and ICEBERG_VERSION.fullmatch(parts[-1]):
            found["/".join(parts[:-2])] = ICEBERG
    return sorted(found.items())


def _live_files(filesystem: fs.FileSystem, place: str, kind: str, shown: str) -> list[str]:
    """Return the names, below the table's folder, of the files of its newest version."""
    if kind == HUDI:
        raise DataError(
            f"{shown}: is a Hudi table, whose folder also holds rows that it has replaced; write plain parquet from "
            "it: spark.read.format('hudi').load(…).write.parquet(…)"
        )
    read = _delta_files if kind == DELTA else _iceberg_files
    try:
        return read(filesystem, place, shown)
    except ImportError as error:
        package = "deltalake" if kind == DELTA else "pyiceberg"
        raise DataError(f"{shown}: is a {kind} table, and {package} is not here ({error}); {INSTALL}") from None
    except DataError:
        raise
    except Exception as error:  # the libraries have many kinds of their own, and none of them may end in a trace
        raise DataError(f"{shown}: the {kind} table cannot be read: {one_line(error)}") from None


def _plain(shown: str, kind: str, problem: str, cure: str) -> DataError:
    load = f"spark.read.format('{kind.lower()}').load(…).write.parquet(…)"
    return DataError(f"{shown}: the {kind} table {problem}; {cure}, or write plain parquet from it: {load}")


def _delta_files(filesystem: fs.FileSystem, place: str, shown: str) -> list[str]:
    from deltalake import DeltaTable

    with _log_here(filesystem, place) as folder:
        table = DeltaTable(folder)
        features = set(table.protocol().reader_features or ())
        strange = sorted(features - PLAIN_FEATURES)
        if strange:
            raise _plain(shown, DELTA, f"uses {strange[0]}, which is not read here", "switch it off")
        if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
            raise _plain(shown, DELTA, "maps names of columns (delta.columnMapping.mode)", "write it anew without")
        if "deletionVectors" in features and _has_deletion_vectors(table):
            raise _plain(shown, DELTA, "has deletion vectors", "REORG TABLE … APPLY (PURGE) writes their files anew")
        names = [action["path"] for action in table.get_add_actions().to_struct_array().to_pylist()]
    for name in names:
        if "://" in name or name.startswith("/"):
            raise _plain(shown, DELTA, f"lists {name}, a file of another table (a shallow clone)", "clone it deeply")
    known = {info.path[len(place) + 1 :] for info in filesystem.get_file_info(fs.FileSelector(place, recursive=True))}
    return [name if name in known else unquote(name) for name in names]


def _has_deletion_vectors(table: DeltaTable) -> bool:
    try:
        return any(batch.num_rows for batch in table.deletion_vectors())
    except Exception:  # noqa: BLE001  one that cannot be read is one
        return True


@contextmanager
def _log_here(filesystem: fs.FileSystem, place: str) -> Iterator[str]:
    """Yield a local folder with the table's log, from its last checkpoint on."""
    if isinstance(filesystem, fs.LocalFileSystem):
        yield place
        return
    log = f"{place}/_delta_log"
    with tempfile.TemporaryDirectory(prefix="delta-log-") as folder:
        os.mkdir(f"{folder}/_delta_log")
        infos = filesystem.get_file_info(fs.FileSelector(log))
        names = [info.base_name for info in infos if info.type == fs.FileType.File]
        first = 0
        if "_last_checkpoint" in names:
            with filesystem.open_input_file(f"{log}/_last_checkpoint") as file:
                first = json.loads(file.read())["version"]
        for name in names:
            if name == "_last_checkpoint" or (name[:20].isdigit() and int(name[:20]) >= first):
                with (
                    filesystem.open_input_file(f"{log}/{name}") as file,
                    open(f"{folder}/_delta_log/{name}", "wb") as to,
                ):
                    to.write(file.read())
        yield folder


def _newest_metadata(filesystem: fs.FileSystem, place: str) -> list[str]:
    """Return the file that describes the newest version; several if that cannot be told, none if there is no table."""
    folder = f"{place}/{ICEBERG_FOLDER}"
    infos = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    names = [info.base_name for info in infos]
    versions = {name: int(match[1]) for name in names if (match := ICEBERG_VERSION.fullmatch(name))}
    newest = max(versions.values(), default=0)
    if "version-hint.text" in names:
        with filesystem.open_input_file(f"{folder}/version-hint.text") as file:
            newest = int(file.read().decode().strip() or newest)
    return [name for name, version in versions.items() if version == newest]


def _iceberg_files(filesystem: fs.FileSystem, place: str, shown: str) -> list[str]:
    from pyiceberg.manifest import FileFormat
    from pyiceberg.table import StaticTable

    from tessera.ctr.data.iceberg_io import files_of_table

    newest = _newest_metadata(filesystem, place)
    if len(newest) != 1:
        raise _plain(shown, ICEBERG, f"has {len(newest)} newest versions: {', '.join(newest)}", "remove the wrong one")
    with filesystem.open_input_file(f"{place}/{ICEBERG_FOLDER}/{newest[0]}") as file:
        described = file.read()
    location = json.loads(described)["location"].rstrip("/")
    with files_of_table(filesystem, place, location) as properties:
        table = StaticTable.from_metadata(f"{location}/{ICEBERG_FOLDER}/{newest[0]}", properties)
        ids: dict[str, int] = {}
        for schema in table.metadata.schemas:
            for field in schema.fields:
                if ids.setdefault(field.name, field.field_id) != field.field_id:
                    raise _plain(shown, ICEBERG, f"has had two columns {field.name!r}", "rewrite its data files")
        tasks = list(table.scan().plan_files())
    names = []
    for task in tasks:
        name = task.file.file_path.removeprefix(f"{location}/")
        if task.delete_files:
            raise _plain(shown, ICEBERG, f"has rows that are deleted in {name}", "rewrite_data_files applies that")
        if task.file.file_format != FileFormat.PARQUET:
            raise _plain(
                shown, ICEBERG, f"holds {name}, which is {task.file.file_format.name}", "rewrite its data files"
            )
        if name == task.file.file_path:
            raise _plain(shown, ICEBERG, f"lists {name} outside of its folder", "rewrite its data files")
        names.append(name)
    return names
