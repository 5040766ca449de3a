"""Write parquet parts in a folder that appears at its final name only when it is complete."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from tessera.ctr.data.errors import DataError
from tessera.ctr.output_folders import replacing, written_by
from tessera.embedding.errors import ConfigError

SUMMARY = "prepare.json"
OPEN_FILES = 64
REOPENED = 64
COMPRESSIONS = ("snappy", "zstd", "lz4", "none")


@dataclass(frozen=True)
class Writing:
    """Settings for writing parquet. row_group_rows: rows that the reader decodes at a time, per lane. Raises
    ConfigError."""

    row_group_rows: int = 16384
    rows_per_file: int = 2_000_000
    compression: str = "snappy"

    def __post_init__(self) -> None:
        for key in ("row_group_rows", "rows_per_file"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: found {getattr(self, key)}, expected at least 1")
        if self.compression not in COMPRESSIONS:
            raise ConfigError(f"compression: found {self.compression!r}, expected one of {', '.join(COMPRESSIONS)}")


@contextmanager
def complete_folder(target: Path, sources: Sequence[Path] = (), *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside `target` that replaces it if the block succeeds, and is removed if it fails.

    With `overwrite` an earlier data set is replaced, and only if all its files are those that this command wrote.

    Raises ConfigError: `target` is in the way, or is, holds or lies in one of the sources.
    """

    def own(folder: Path) -> str | None:
        if not overwrite:
            return "it is not empty (--overwrite replaces a prepared data set)"
        return written_by("prepare.py")(folder)

    with replacing(target, "--output", "prepare.py", sources, own=own) as folder:
        yield folder


def write_description(folder: Path, schema: dict, summary: dict) -> None:
    """Write schema.yaml and prepare.json into a data set's root."""
    (folder / "schema.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"schema": schema})))
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


class PartsWriter:
    """Writes rows of several folders, each as part-00000.parquet, part-00001.parquet, ... of whole row groups.

    The rows and row groups of a folder depend only on the rows appended to it, not on how they were cut into
    tables, as long as at most 64 folders are written side by side. Beyond that the file of the folder longest
    not written to is closed, and its next rows open a new part: memory and open files stay bounded. Input
    that goes to and fro over more folders than that would end in crumbs: DataError.
    """

    def __init__(self, root: Path, writing: Writing, dictionary_columns: list[str] | None = None) -> None:
        self.root, self.writing = root, writing
        self.dictionary: list[str] | bool = True if dictionary_columns is None else dictionary_columns
        self.rows: dict[str, int] = {}
        self._parts: dict[str, int] = {}
        self._open: OrderedDict[str, _Part] = OrderedDict()
        self._closed_early: set[str] = set()
        self._reopened = 0

    def append(self, folder: str, table: pa.Table) -> None:
        """Append rows to a folder (a name under the root). All tables of a root have one schema."""
        if not table.num_rows:
            return
        self.rows[folder] = self.rows.get(folder, 0) + table.num_rows
        while table.num_rows:
            part = self._part(folder, table.schema)
            room = self.writing.rows_per_file - part.rows
            part.append(table.slice(0, room))
            if part.rows == self.writing.rows_per_file:
                self._open.pop(folder).close()
            table = table.slice(room)

    def close(self) -> None:
        """Write what is buffered and close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _part(self, folder: str, schema: pa.Schema) -> _Part:
        if folder not in self._open:
            if len(self._open) == OPEN_FILES:
                early, part = self._open.popitem(last=False)
                part.close()
                self._closed_early.add(early)
            number = self._parts.get(folder, 0)
            self._check_reopened(folder)
            self._parts[folder] = number + 1
            (self.root / folder).mkdir(exist_ok=True)
            path = self.root / folder / f"part-{number:05d}.parquet"
            self._open[folder] = _Part(path, schema, self.writing, dictionary=self.dictionary)
        self._open.move_to_end(folder)
        return self._open[folder]

    def _check_reopened(self, folder: str) -> None:
        if folder in self._closed_early:
            self._closed_early.discard(folder)
            self._reopened += 1
            if self._reopened > REOPENED:
                raise DataError(
                    f"{folder}: rows found in turn for more than {OPEN_FILES} folders, expected input ordered by time"
                )


class _Part:
    def __init__(self, path: Path, schema: pa.Schema, writing: Writing, *, dictionary: list[str] | bool) -> None:
        self.row_group_rows = writing.row_group_rows
        self.rows = 0
        self.pending: list[pa.Table] = []
        self.pending_rows = 0
        self.file = pq.ParquetWriter(
            path, schema, compression=writing.compression, use_dictionary=dictionary, write_page_checksum=True
        )

    def append(self, table: pa.Table) -> None:
        self.pending.append(table)
        self.pending_rows += table.num_rows
        self.rows += table.num_rows
        if self.pending_rows >= self.row_group_rows:
            self._write(self.pending_rows // self.row_group_rows * self.row_group_rows)

    def close(self) -> None:
        self._write(self.pending_rows)
        self.file.close()

    def _write(self, rows: int) -> None:
        if rows:
            table = pa.concat_tables(self.pending)
            self.file.write_table(table.slice(0, rows), row_group_size=self.row_group_rows)
            # A slice would keep the whole table alive; a copy of the short rest does not.
            rest = table.slice(rows)
            self.pending = [rest.take(pa.array(np.arange(rest.num_rows)))]
            self.pending_rows -= rows
