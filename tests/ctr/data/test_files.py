"""Where data sets lie: folders, files, days, and file systems that are not this machine's disk."""

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.listing import list_files
from tessera.ctr.data.reader import ParquetReader
from tessera.embedding.errors import ConfigError
from tests.ranks import run_script

from .rows import features, taken_apart, write


def table(first: int, rows: int = 10) -> dict:
    return {"label": np.arange(rows) % 2, "row": np.arange(first, first + rows)}


def rows_of(path, **options) -> list[int]:
    reader = ParquetReader(path, features("row"), 7, **{"lanes": 2, **options})
    return sorted(row["ids"]["row"][0] for batch in reader.epoch(0) for row in taken_apart(batch))


def test_files_are_sorted_by_name_and_hidden_ones_passed_over(tmp_path):
    for name in ("b/2.parquet", "b/10.parquet", "a.pq", "_logs/0.parquet", ".x.parquet"):
        write(tmp_path / Path(name).parent, {})
        pq.write_table(pa.table(table(0)), tmp_path / name)
    for folder in (tmp_path, tmp_path / "b"):
        (folder / "part-0.parquet").unlink()
    listing = list_files(str(tmp_path))
    assert [file.name for file in listing.files] == ["a.pq", "b/10.parquet", "b/2.parquet"]
    assert listing.passed_over == [f"{tmp_path}/.x.parquet", f"{tmp_path}/_logs"]


def test_a_file_several_paths_and_a_path_given_twice(tmp_path):
    one, two = write(tmp_path / "one", table(0)), write(tmp_path / "two", table(10))
    assert rows_of(f"{one}/part-0.parquet") == list(range(10))
    assert rows_of([two, one]) == list(range(20))
    with pytest.raises(DataError, match="part-0.parquet: listed twice"):
        rows_of([one, f"{one}/part-0.parquet"])


def test_days(tmp_path):
    for day in (1, 2, 3):
        write(tmp_path / f"day=2026-11-0{day}", table(day * 100), table(day * 100 + 10))
    path = str(tmp_path)
    assert len(rows_of(path)) == 60
    assert rows_of(path, days=["2026-11-02"]) == list(range(200, 220))
    assert rows_of(path, days=["2026-11-03", "2026-11-01"]) == [*range(100, 120), *range(300, 320)]
    assert rows_of(f"{path}/day=2026-11-02", days=["2026-11-02"]) == list(range(200, 220))
    with pytest.raises(DataError, match="no folder day=2026-11-04; did you mean '2026-11-03'"):
        rows_of(path, days=["2026-11-03", "2026-11-04"])
    with pytest.raises(DataError, match="data.days is set and no folder is called day=YYYY-MM-DD"):
        rows_of(write(tmp_path / "flat", table(0)), days=["2026-11-04"])


def memory_data_set(folder: str, *tables: dict) -> str:
    filesystem = fsspec.filesystem("memory")
    for i, columns in enumerate(tables):
        with filesystem.open(f"/{folder}/part-{i}.parquet", "wb") as file:
            pq.write_table(pa.table(columns), file, row_group_size=4)
    return f"memory://{folder}"


def test_a_uri_reads_as_a_folder_does():
    path = memory_data_set("bucket/train", table(0), table(10), table(20))
    assert rows_of(path, threads=2) == list(range(30))
    assert rows_of(f"{path}/part-1.parquet") == list(range(10, 20))
    with pytest.raises(DataError, match="memory://bucket/nowhere: not found"):
        rows_of("memory://bucket/nowhere")
    path = memory_data_set("bucket/bad", table(0), {"label": [0], "row": ["x"]})
    with pytest.raises(DataError, match="memory://bucket/bad/part-1.parquet: column 'row'.*found string"):
        rows_of(path)


def test_days_of_a_uri():
    for day in (1, 2):
        memory_data_set(f"daily/day=2026-11-0{day}", table(day * 100))
    assert rows_of("memory://daily", days=["2026-11-02"]) == list(range(200, 210))


def test_a_local_uri_is_a_local_path(tmp_path):
    assert rows_of(f"file://{write(tmp_path / 'd', table(0))}") == list(range(10))


def test_an_unknown_scheme_is_named():
    with pytest.raises(ConfigError, match="nonsense://bucket/x cannot be opened: .*nonsense"):
        rows_of("nonsense://bucket/x")


OPENED = """
import json, resource, sys
from tessera.ctr.data.reader import ParquetReader
from tests.ctr.data.rows import features, taken_apart
reader = ParquetReader(sys.argv[1], features("row"), 100, **json.loads(sys.argv[3]))
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
rows = [row["ids"]["row"][0] for batch in reader.epoch(0) for row in taken_apart(batch)]
assert sorted(rows) == list(range(reader.rows)), len(rows)
import hashlib
print(reader.rows, hashlib.sha256(str(rows).encode()).hexdigest())
"""


@pytest.mark.parametrize(
    "options", [pytest.param({"lanes": 16}, marks=pytest.mark.slow), {"lanes": 2, "threads": 2, "window_rows": 1000}]
)
def test_more_files_are_read_than_may_be_open(tmp_path, options):
    """Windows of some small files and of very many."""
    path = write(tmp_path / "many", *(table(first, 5) for first in range(0, 1250, 5)))
    said = []
    for limit in (200, 900):
        done = run_script("-c", OPENED, path, str(limit), json.dumps(options))
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout)
    assert said[0] == said[1] and said[0].startswith("1250 ")


def test_too_few_open_files_are_named_with_the_keys_that_need_them(tmp_path):
    path = write(tmp_path / "many", *(table(first, 5) for first in range(0, 300, 5)))
    done = run_script("-c", OPENED, path, "20", '{"lanes": 1}')
    line = done.stderr.splitlines()[-1]
    assert "this process may open no more files (ulimit -n 20); raise that, or lower data.threads" in line, done.stderr


def test_the_reader_imports_without_torchrec():
    """Ranks and helpers that only look at data start quickly."""
    code = "import sys, tessera.ctr.data.reader; print(sorted({'torch', 'torchrec', 'pandas'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
