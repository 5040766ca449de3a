"""Let pyiceberg read a table's metadata through the file system that the data set is read with.

Metadata names every file by the place where the table was written. It is looked for where the table lies now, so that
a table may be copied, and its store reached in the way that this project's URIs say.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.fs as fs
from pyiceberg.io import FileIO, InputFile, OutputFile

_TABLES: dict[str, tuple[fs.FileSystem, str, str]] = {}  # pyiceberg makes FileIO from properties, which are texts


class TableIO(FileIO):
    """Reads files below the folder of one table."""

    def new_input(self, location: str) -> InputFile:
        filesystem, place, written = _TABLES[self.properties["tessera.table"]]
        return _Input(location, filesystem, place + location.removeprefix(written))

    def new_output(self, location: str) -> OutputFile:
        raise NotImplementedError(f"{location}: tables are only read")

    def delete(self, location: str | InputFile | OutputFile) -> None:
        raise NotImplementedError(f"{location}: tables are only read")


class _Input(InputFile):
    def __init__(self, location: str, filesystem: fs.FileSystem, place: str) -> None:
        super().__init__(location)
        self._filesystem, self._place = filesystem, place

    def __len__(self) -> int:
        return self._filesystem.get_file_info(self._place).size

    def exists(self) -> bool:
        return self._filesystem.get_file_info(self._place).type == fs.FileType.File

    def open(self, seekable: bool = True) -> pa.NativeFile:  # noqa: FBT001, FBT002 (pyiceberg's signature)
        return self._filesystem.open_input_file(self._place)


@contextmanager
def files_of_table(filesystem: fs.FileSystem, place: str, written: str) -> Iterator[dict[str, str]]:
    """Yield properties that let pyiceberg read a table at `place` whose metadata says that it lies at `written`."""
    name = uuid.uuid4().hex
    _TABLES[name] = (filesystem, place, written)
    try:
        yield {"py-io-impl": f"{__name__}.TableIO", "tessera.table": name}
    finally:
        del _TABLES[name]
