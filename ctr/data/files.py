"""Open the parquet files of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq


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

    def open(self, **options: Any) -> pq.ParquetFile:
        """Open the file. Options are those of `pyarrow.parquet.ParquetFile`."""
        return pq.ParquetFile(self.filesystem.open_input_file(self.location), **options)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
