"""Where the small real data sets lie, and a slow, independent way to read parquet back."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).resolve().parents[4] / ".." / "shared"))


def sample(name: str) -> Path:
    """The folder of a real data set; skips the test where it is absent."""
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


def rows(folder: Path) -> list[dict]:
    """All rows below a folder, in the order of its files."""
    files = sorted(folder.rglob("*.parquet"))
    return pa.concat_tables([pq.read_table(file, partitioning=None) for file in files]).to_pylist()
