"""Real tables of Delta and Iceberg, with rows that were deleted and files that were written anew."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.daily.partitions import find_partitions, fingerprint
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.listing import list_files
from tessera.ctr.data.reader import ParquetReader

from .rows import features, taken_apart

pytest.importorskip("deltalake", reason="requirements/lakes.txt is not installed")
pytest.importorskip("pyiceberg", reason="requirements/lakes.txt is not installed")

SCHEMA = features("row")


def rows_of(path, **options) -> list[int]:
    reader = ParquetReader(path, SCHEMA, 7, lanes=1, **options)
    return sorted(row["ids"]["row"][0] for batch in reader.epoch(0) for row in taken_apart(batch))


def table(first: int, day: str = "2026-11-01", rows: int = 10) -> pa.Table:
    return pa.table(
        {"label": pa.array([0, 1] * (rows // 2), pa.int8()), "row": range(first, first + rows), "day": [day] * rows}
    )


@pytest.fixture(scope="module")
def delta(tmp_path_factory) -> Path:
    """Rows 5 to 19 of the first day, 100 to 109 of the second; a third day has lost all of its rows."""
    from deltalake import DeltaTable, write_deltalake

    path = str(tmp_path_factory.mktemp("delta") / "table")
    for first, day in ((0, "2026-11-01"), (10, "2026-11-01"), (100, "2026-11-02"), (200, "2026-11-03 a%b")):
        write_deltalake(path, table(first, day), partition_by=["day"], mode="append")
    DeltaTable(path).delete("row < 5")
    DeltaTable(path).delete("row >= 200")
    DeltaTable(path).optimize.compact()
    return Path(path)


@pytest.fixture(scope="module")
def iceberg(tmp_path_factory) -> Path:
    """The same rows."""
    from pyiceberg.catalog.sql import SqlCatalog

    root = tmp_path_factory.mktemp("iceberg")
    catalog = SqlCatalog("here", uri=f"sqlite:///{root}/catalog.db", warehouse=f"file://{root}")
    catalog.create_namespace("n")
    made = catalog.create_table("n.t", schema=table(0).schema)
    with made.update_spec() as spec:
        spec.add_identity("day")
    for first, day in ((0, "2026-11-01"), (10, "2026-11-01"), (100, "2026-11-02"), (200, "2026-11-03")):
        made.append(table(first, day))
    made.delete("row < 5")
    made.delete("row >= 200")
    return root / "n" / "t"


EXPECTED = [*range(5, 20), *range(100, 110)]


@pytest.fixture(params=["delta", "iceberg"])
def lake(request) -> Path:
    return request.getfixturevalue(request.param)


def first_day(lake: Path) -> Path:
    return next(path for path in lake.rglob("day=2026-11-01") if path.is_dir())


def test_removed_rows_are_not_read(lake):
    assert len(list(lake.rglob("*.parquet"))) > len(list_files(str(lake)).files), "removed files lie there"
    assert rows_of(str(lake)) == EXPECTED
    assert rows_of(str(lake), days=["2026-11-02"]) == EXPECTED[15:]
    assert rows_of(str(lake), days=["2026-11-01", "2026-11-02"]) == EXPECTED


def test_a_folder_a_pattern_and_a_file_inside_a_table_know_its_log(lake):
    day = first_day(lake)
    assert rows_of(str(day)) == EXPECTED[:15]
    assert rows_of(f"{day}/*.parquet") == EXPECTED[:15]
    assert rows_of(f"{day.parent}/day=*") == EXPECTED
    live = {file.location for file in list_files(str(day)).files}
    removed = next(path for path in day.glob("*.parquet") if str(path) not in live)
    with pytest.raises(DataError, match=f"{removed.name}: is not among the files of the .* table that it lies in"):
        rows_of(str(removed))
    assert rows_of(sorted(live)) == EXPECTED[:15]


def test_a_table_below_the_path_and_one_that_was_copied(lake, tmp_path):
    shutil.copytree(lake, tmp_path / "deeper" / "table")
    (tmp_path / "plain").mkdir()
    pq.write_table(table(1000), tmp_path / "plain" / "part-0.parquet")
    assert rows_of(str(tmp_path)) == [*EXPECTED, *range(1000, 1010)]


def test_a_table_behind_a_uri(lake):
    memory = fsspec.filesystem("memory")
    memory.put(str(lake), "/lakes/table", recursive=True)
    try:
        assert rows_of("memory://lakes/table") == EXPECTED
        day = str(first_day(lake).relative_to(lake))
        assert rows_of(f"memory://lakes/table/{day}") == EXPECTED[:15]
    finally:
        memory.rm("/lakes", recursive=True)


def test_days_of_a_table(lake):
    found = find_partitions(str(lake), None, None)
    assert [one.key for one in found] == ["2026-11-01", "2026-11-02"], "a day without live files is none"
    assert rows_of(found[0].source) == EXPECTED[:15]
    assert len({fingerprint(one) for one in found}) == 2


def test_a_checkpoint_of_a_delta_log(delta, tmp_path):
    from deltalake import DeltaTable

    path = tmp_path / "table"
    shutil.copytree(delta, path)
    DeltaTable(str(path)).create_checkpoint()
    DeltaTable(str(path)).delete("row = 19")
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/lakes/checkpoint", recursive=True)
    memory.rm("/lakes/checkpoint/_delta_log/00000000000000000000.json")
    try:
        assert rows_of("memory://lakes/checkpoint") == rows_of(str(path)) == [row for row in EXPECTED if row != 19]
    finally:
        memory.rm("/lakes", recursive=True)


def add_to_log(path: Path, *actions: dict) -> None:
    log = path / "_delta_log"
    version = len(list(log.glob("*.json")))
    (log / f"{version:020d}.json").write_text("".join(json.dumps(action) + "\n" for action in actions))


def protocol(*features: str) -> dict:
    return {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": list(features),
                         "writerFeatures": list(features)}}  # fmt: skip


def test_delta_tables_that_plain_files_can_not_express(delta, tmp_path):
    def copy(name: str) -> Path:
        shutil.copytree(delta, tmp_path / name)
        return tmp_path / name

    path = copy("vectors")
    add_to_log(path, protocol("deletionVectors"))
    assert rows_of(str(path)) == EXPECTED, "the feature alone deletes nothing"
    live = list_files(str(path)).files[0]
    vector = {"storageType": "u", "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^", "offset": 1, "sizeInBytes": 36,
              "cardinality": 2}  # fmt: skip
    size = Path(live.location).stat().st_size
    add = {"path": live.name, "size": size, "partitionValues": {"day": "2026-11-01"}, "modificationTime": 0,
           "dataChange": True, "stats": '{"numRecords": 10}', "deletionVector": vector}  # fmt: skip
    remove = {"path": live.name, "dataChange": True, "deletionTimestamp": 0, "partitionValues": {"day": "2026-11-01"}}
    add_to_log(path, {"remove": remove}, {"add": add})
    with pytest.raises(DataError, match=r"vectors: the Delta table has deletion vectors; REORG TABLE .*write.parquet"):
        rows_of(str(path))
    path = copy("lost")
    Path(list_files(str(path)).files[0].location).unlink()
    with pytest.raises(DataError, match="lost: the Delta table lists .*parquet, and there is no such file"):
        rows_of(str(path))
    path = copy("broken")
    (path / "_delta_log" / "00000000000000000001.json").write_text("{")
    with pytest.raises(DataError, match="broken: the Delta table cannot be read: ") as error:
        rows_of(str(path))
    assert "\n" not in str(error.value)


def test_iceberg_versions_that_can_not_be_told(iceberg, tmp_path):
    path = tmp_path / "t"
    shutil.copytree(iceberg, path)
    versions = sorted((path / "metadata").glob("*.metadata.json"))
    shutil.copy(versions[-1], versions[-1].with_name(versions[-1].name[:6] + "other.metadata.json"))
    with pytest.raises(DataError, match="the Iceberg table has 2 newest versions"):
        rows_of(str(path))
    (path / "metadata" / "version-hint.text").write_text("2")
    assert rows_of(str(path)) == [*range(10)], "the version that the hint names"


def test_iceberg_rows_that_are_deleted_one_by_one_are_refused(iceberg, monkeypatch):
    from pyiceberg.table import DataScan

    plan = DataScan.plan_files

    def with_deletes(scan):
        tasks = list(plan(scan))
        tasks[0].delete_files.add(tasks[0].file)
        return tasks

    monkeypatch.setattr(DataScan, "plan_files", with_deletes)
    with pytest.raises(DataError, match="the Iceberg table has rows that are deleted in data/.*rewrite_data_files"):
        rows_of(str(iceberg))


def test_hudi_is_refused(tmp_path):
    (tmp_path / ".hoodie").mkdir()
    pq.write_table(table(0), tmp_path / "x_0-1-0_20261101.parquet")
    for path in (tmp_path, tmp_path / "x_0-1-0_20261101.parquet"):
        with pytest.raises(DataError, match=r"is a Hudi table, .*spark.read.format\('hudi'\).load\(…\).write.parquet"):
            rows_of(str(path))
    with pytest.raises(DataError, match="is a Hudi table"):
        find_partitions(str(tmp_path), None, None)


@pytest.mark.parametrize("package", ["deltalake", "pyiceberg"])
def test_without_the_library_one_line_says_how_to_install_it(package, request):
    path = request.getfixturevalue("delta" if package == "deltalake" else "iceberg")
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        f"from tessera.ctr.data.listing import list_files\nlist_files({str(path)!r})"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    line = done.stderr.splitlines()[-1]
    assert f"{package} is not here" in line and "pip install --no-deps -r requirements/lakes.txt" in line
