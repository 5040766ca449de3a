"""Partitions are found by listing, known again by their content, and refused by name where the calendar has a hole."""

from datetime import timedelta
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.daily.calendar import Calendar
from tessera.ctr.daily.day_record import DayRecord, Stage
from tessera.ctr.daily.partitions import (
    PartitionError,
    check_content,
    find_partitions,
    fingerprint,
    is_last,
    key_behind,
    order,
    period_of,
)
from tessera.ctr.data.day_folders import DayFolders, check_key
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.listing import list_files
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError
from tests.ctr.daily.days import folder_of, write_day, write_days

DAY, HOUR = timedelta(days=1), timedelta(hours=1)


def keys(partitions) -> list[str]:
    return [partition.key for partition in partitions]


def write_hours(folder: Path, hours: list[str]) -> Path:
    for hour in hours:
        path = folder_of(folder, hour)
        path.mkdir(parents=True)
        pq.write_table(pa.table({"x": np.arange(10)}), path / "part.parquet")
    return folder


def test_days_are_found_in_order_and_in_range(tmp_path):
    data = write_days(tmp_path, 4, rows=20)
    (data / "teacher.json").write_text("{}")
    (data / "other").mkdir()
    assert keys(find_partitions(str(data), None, None)) == ["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04"]
    assert keys(find_partitions(str(data), "2026-01-02", "2026-01-03")) == ["2026-01-02", "2026-01-03"]
    (data / "day=2026-01-03" / "_SUCCESS").touch()
    assert [one.key for one in find_partitions(str(data), None, None) if one.marked] == ["2026-01-03"]
    with pytest.raises(DataError, match=r"day=2026-02-30: its name is no date; expected day=YYYY-MM-DD"):
        (data / "day=2026-02-30").mkdir()
        find_partitions(str(data), None, None)
    with pytest.raises(DataError, match="nowhere"):
        find_partitions(str(tmp_path / "nowhere"), None, None)


def test_hours_below_days(tmp_path):
    hours = ["2026-01-01T22", "2026-01-01T23", "2026-01-02T00", "2026-01-02T01"]
    data = write_hours(tmp_path, hours)
    found = find_partitions(str(data), None, None)
    assert keys(found) == hours
    assert found[0].path == f"{data}/day=2026-01-01/hour=22" == str(folder_of(data, hours[0]))
    assert keys(find_partitions(str(data), "2026-01-01T23", "2026-01-02T00")) == hours[1:3]
    assert keys(find_partitions(str(data), None, "2026-01-01")) == hours[:2]
    assert period_of(hours, None) == HOUR and key_behind(hours[1], HOUR) == hours[2]
    assert is_last(hours[1], "2026-01-01", HOUR) and not is_last(hours[0], "2026-01-01", HOUR)
    (data / "day=2026-01-01" / "part.parquet").touch()
    with pytest.raises(PartitionError, match="day=2026-01-01/part.parquet: lies beside hours and is none"):
        find_partitions(str(data), None, None)


def plan(found: list[str], done: list[str] = (), skip: list[str] = (), period: timedelta = DAY) -> list[str]:
    """Keys that are due; a missing one in brackets."""
    from tessera.ctr.daily.partitions import Partition

    due = order([Partition(f"2026-01-{day}", f"day={day}") for day in found], [f"2026-01-{day}" for day in done],
                [f"2026-01-{day}" for day in skip], period)  # fmt: skip
    return [key[-2:] if partition else f"[{key[-2:]}]" for key, partition in due]


def test_what_is_due():
    assert plan(["01", "02", "03"]) == ["01", "02", "03"]
    assert plan(["01", "02", "03"], done=["01", "02"]) == ["03"]
    assert plan(["01", "02"], done=["01", "02"]) == []
    assert plan(["01", "08", "15"], period=timedelta(days=7)) == ["01", "08", "15"]
    assert plan(["01", "03"], skip=["02"]) == ["01", "[02]", "03"]
    assert plan(["01", "02"], done=["02"], skip=["01"]) == ["01"]
    assert plan(["01", "02", "03"], done=["01"], skip=["02"]) == ["02", "03"]
    assert plan(["01"], skip=["02", "03"]) == ["01", "[02]", "[03]"]


@pytest.mark.parametrize(
    ("found", "done", "problem"),
    [
        (["01", "03"], [], r"2026-01-02 is missing: found 2026-01-03, expected a partition every 24 hours; daily.skip"),
        (["01", "02", "04"], ["01", "02"], "2026-01-03 is missing: found 2026-01-04"),
        (["01", "02", "03"], ["02"], r"day=01 is late: 2026-01-02 is done, and 2026-01-01 never was; daily.skip=\["),
    ],
)
def test_gaps_and_late_ones_are_named(found, done, problem):
    with pytest.raises(PartitionError, match=problem):
        plan(found, done)


def test_content_is_known_again(tmp_path):
    one, two = (write_days(tmp_path / name, 2, rows=40) for name in ("one", "two"))
    first, second = find_partitions(str(one), None, None)
    seen = fingerprint(first)
    assert seen == fingerprint(find_partitions(str(two), None, None)[0])
    assert seen != fingerprint(second)
    record = DayRecord(first.key, seen, Stage.TRAINED)
    check_content(first.key, first.path, seen, [record])
    with pytest.raises(PartitionError, match=rf"day=2026-01-02 repeats 2026-01-01: both have the fingerprint {seen}"):
        check_content(second.key, second.path, seen, [record])
    write_day(one, 0, rows=40, flipped=0.3)  # as many rows and bytes
    changed = fingerprint(first)
    with pytest.raises(PartitionError, match=f"has changed since it was trained: fingerprint {changed}, then {seen}"):
        check_content(first.key, first.path, changed, [record])
    (one / "day=2026-01-02" / "part-1.parquet").rename(one / "day=2026-01-02" / "part-2.parquet")
    assert fingerprint(second) != fingerprint(find_partitions(str(two), None, None)[1])


def test_a_file_without_a_footer_is_named(tmp_path):
    data = write_days(tmp_path, 1, rows=40)
    part = data / "day=2026-01-01" / "part-1.parquet"
    part.write_bytes(part.read_bytes()[:-5])
    (partition,) = find_partitions(str(data), None, None)
    with pytest.raises(PartitionError, match=r"part-1.parquet: no readable parquet footer in its [\d,]+ bytes"):
        fingerprint(partition)


def test_partitions_behind_a_uri(tmp_path):
    local = write_days(tmp_path, 2, rows=40)
    memory = fsspec.filesystem("memory")
    memory.put(str(local), "/daily-test", recursive=True)
    here, there = find_partitions(str(local), None, None), find_partitions("memory://daily-test", None, None)
    assert keys(here) == keys(there)
    assert [fingerprint(one) for one in here] == [fingerprint(one) for one in there]
    memory.rm("/daily-test", recursive=True)


@pytest.mark.parametrize("key", ["2026-1-1", "2026-13-01", "today", "2026-01-01T24"])
def test_what_is_no_partition(key):
    with pytest.raises(ConfigError, match=f"daily.first is '{key}'; expected a day as 2026-01-31"):
        check_key(key, "daily.first")


def write_folders(folder: Path, *names: str) -> str:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.table({"x": np.arange(number + 1)}), folder / name / "part.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "form", "folders", "expected"),
    [
        ("day", "%Y-%m-%d", ["day=2026-1-9", "day=2026-01-10"], ["2026-01-09", "2026-01-10"]),
        ("dt", "%Y%m%d", ["dt=20260110", "dt=20260109"], ["2026-01-09", "2026-01-10"]),
        (None, "%Y-%m-%d", ["2026-01-09"], ["2026-01-09"]),
        (None, "%Y/%m/%d", ["2026/01/09", "2026/01/10"], ["2026-01-09", "2026-01-10"]),
        (None, "year=%Y/month=%m/day=%d", ["year=2026/month=1/day=9"], ["2026-01-09"]),
        ("ts", "%Y-%m-%d %H:00:00", ["ts=2026-01-09 05%3A00%3A00", "ts=2026-01-09 6%3A00%3A00"],
         ["2026-01-09T05", "2026-01-09T06"]),
        ("h", "%Y%m%d%H", ["h=2026010923", "h=2026011000"], ["2026-01-09T23", "2026-01-10T00"]),
    ],
)  # fmt: skip
def test_folders_are_called_as_the_configuration_says(tmp_path, name, form, folders, expected):
    calls = DayFolders(name, form)
    found = find_partitions(write_folders(tmp_path, *folders), None, None, calls)
    assert keys(found) == expected
    assert sorted(one.path for one in found) == sorted(f"{tmp_path}/{one}" for one in folders)
    assert [calls.key_of(calls.folder_of(key).split("/")) for key in expected] == expected
    assert keys(find_partitions(str(tmp_path), expected[-1], None, calls)) == expected[-1:]


@pytest.mark.parametrize(
    ("folders", "problem"),
    [
        (["dt=2026-01-01"], r"dt=2026-01-01: is no folder day=YYYY-MM-DD \(data.partition\); found dt=2026-01-01: "
                            r"data.partition.name=dt data.partition.format=%Y-%m-%d reads such folders"),
        (["20260101"], r"20260101: is no folder .*data.partition.name= data.partition.format=%Y%m%d reads such"),
        (["day=20260101"], r"found day=20260101: data.partition.format=%Y%m%d reads such folders"),
        (["day=2026-01-01", "day=__HIVE_DEFAULT_PARTITION__"], r"day=__HIVE_DEFAULT_PARTITION__: is no folder day="),
        (["day=2026-01-01", "region=eu"], r"region=eu: is no folder .*move it away, or begin its name with _"),
        (["day=2026-01-01", "day=2026-1-1"], r"day=2026-1-1: is 2026-01-01, and so is .*day=2026-01-01; expected it"),
        (["day=2026-01-01/hour=8", "day=2026-01-01/hour=08"], r"hour=8: is 2026-01-01T08, and so is .*hour=08"),
        (["day=2026-01-01/hour=8", "day=2026-01-01/hour=25"], r"day=2026-01-01: hour=25 is no hour: expected hour=00"),
        (["day=2026-01-01/hour=8", "day=2026-01-01/region=eu"], r"region=eu: lies beside hours and is none"),
        (["day=2026-01-01/hour=__HIVE_DEFAULT_PARTITION__"], r"hour=__HIVE_DEFAULT_PARTITION__ is no hour"),
        (["day=2026-01-01", "_temporary/0"], r"_temporary: a job that writes here has not ended"),
    ],
)  # fmt: skip
def test_no_folder_is_lost(tmp_path, folders, problem):
    with pytest.raises(DataError, match=problem):
        find_partitions(write_folders(tmp_path, *folders), None, None)


def test_hours_as_spark_writes_an_integer_column(tmp_path):
    data = write_folders(tmp_path, *(f"day=2026-01-0{day}/hour={hour}" for day in (1, 2) for hour in (10, 9, 8)))
    found = find_partitions(data, None, None)
    assert keys(found) == [f"2026-01-0{day}T{hour}" for day in (1, 2) for hour in ("08", "09", "10")]
    assert found[0].path == f"{data}/day=2026-01-01/hour=8"
    assert keys(find_partitions(data, "2026-01-01T09", "2026-01-02T08")) == keys(found)[1:4]


def test_a_day_of_regions_is_one_partition(tmp_path):
    data = write_folders(tmp_path, "day=2026-01-01/region=eu", "day=2026-01-01/region=us")
    (found,) = find_partitions(data, None, None)
    assert found.key == "2026-01-01" and len(list_files(found.source).files) == 2


@pytest.mark.parametrize("empty", ["folder", "rows", "marker"])
def test_an_empty_partition_names_the_key_that_passes_it_over(tmp_path, empty):
    day = tmp_path / "day=2026-01-01"
    day.mkdir()
    if empty == "rows":
        pq.write_table(pa.table({"x": pa.array([], pa.int64())}), day / "part.parquet")
    if empty == "marker":
        (day / "_SUCCESS").touch()
    (found,) = find_partitions(str(tmp_path), None, None)
    with pytest.raises(PartitionError, match=r"found (0 rows|no parquet file).*daily.skip=\[2026-01-01\] passes"):
        fingerprint(found)


def test_markers_of_days_and_of_hours(tmp_path):
    data = write_folders(tmp_path, "day=2026-01-01/hour=0", "day=2026-01-01/hour=1", "day=2026-01-02/hour=0")
    (tmp_path / "day=2026-01-01" / "hour=1" / "_SUCCESS").touch()
    (tmp_path / "day=2026-01-02" / "_SUCCESS").touch()
    marked = [one.marked for one in find_partitions(data, None, None)]
    assert marked == [False, True, True]
    assert all(one.marked for one in find_partitions(data, None, None, marker=None))
    (tmp_path / "day=2026-01-01" / "hour=0" / "_temporary").mkdir()
    assert [one.written for one in find_partitions(data, None, None)] == [True, False, False]


def calendar_of(data: Path, *overrides: str) -> tuple[Calendar, list[str]]:
    """A calendar on one rank, and what it says."""
    said: list[str] = []
    config = load_config([f"data.path={data}", "trainer.run_dir=run", *overrides], "")
    process = Process(0, 0, 1, torch.device("cpu"), None)
    return Calendar(config, process, said.append), said


def due_of(calendar: Calendar, done: list[str] = ()) -> list[str]:
    records = [DayRecord(key, None, Stage.TRAINED) for key in done]
    for one in calendar.due(records):
        records.append(DayRecord(one.key, None, Stage.TRAINED))
    return [record.partition for record in records[len(done) :]]


def test_the_last_partition_without_its_marker_is_not_due(tmp_path):
    data = write_days(tmp_path, 4, rows=20)
    assert due_of(calendar_of(data)[0]) == ["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04"]
    for day in (1, 2, 3):
        (data / f"day=2026-01-0{day}" / "_SUCCESS").touch()
    calendar, said = calendar_of(data)
    assert due_of(calendar, ["2026-01-01"]) == ["2026-01-02", "2026-01-03"]
    assert len(said) == 1 and "day=2026-01-04 is not complete and not trained: it holds no _SUCCESS" in said[0]
    assert "daily.skip=[2026-01-04] passes it over" in said[0]
    for overrides in (["daily.to=2026-01-04"], ["daily.from=2026-01-04"]):
        with pytest.raises(PartitionError, match="day=2026-01-04 is not complete and not trained"):
            due_of(calendar_of(data, *overrides)[0])
    assert due_of(calendar_of(data, "daily.marker=null")[0])[-1] == "2026-01-04"
    assert due_of(calendar_of(data, "daily.skip=[2026-01-04]")[0])[-1] == "2026-01-04"
    (data / "day=2026-01-04" / "_SUCCESS").touch()
    (data / "day=2026-01-02" / "_SUCCESS").unlink()
    with pytest.raises(PartitionError, match="day=2026-01-02 is not complete and not trained"):
        due_of(calendar_of(data)[0])
    assert due_of(calendar_of(data)[0], ["2026-01-01", "2026-01-02"]) == ["2026-01-03", "2026-01-04"]


def test_a_partition_that_is_still_written_is_not_due(tmp_path):
    data = write_days(tmp_path, 2, rows=20)
    (data / "day=2026-01-02" / "_temporary").mkdir()
    calendar, said = calendar_of(data)
    assert due_of(calendar) == ["2026-01-01"]
    assert "day=2026-01-02 is not complete and not trained: a job writes below its _temporary" in said[0]
