"""Partitions are found by listing, known again by their content, and refused by name where the calendar has a hole."""

from datetime import timedelta
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctr.daily.partitions import (
    PartitionError,
    check_content,
    check_key,
    find_partitions,
    fingerprint,
    folder_of,
    is_last,
    key_behind,
    order,
    period_of,
)
from ctr.data.errors import DataError
from embedding.errors import ConfigError
from tests.ctr.daily.days import write_day, write_days

DAY, HOUR = timedelta(days=1), timedelta(hours=1)


def keys(partitions) -> list[str]:
    return [partition.key for partition in partitions]


def write_hours(folder: Path, hours: list[str]) -> Path:
    for hour in hours:
        path = Path(folder_of(str(folder), hour))
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
    assert keys(find_partitions(str(data), None, None, "_SUCCESS")) == ["2026-01-03"]
    with pytest.raises(ConfigError, match=r"the folder of a day is '2026-02-30'; expected a day as 2026-01-31"):
        (data / "day=2026-02-30").mkdir()
        find_partitions(str(data), None, None)
    with pytest.raises(DataError, match="nowhere"):
        find_partitions(str(tmp_path / "nowhere"), None, None)


def test_hours_below_days(tmp_path):
    hours = ["2026-01-01T22", "2026-01-01T23", "2026-01-02T00", "2026-01-02T01"]
    data = write_hours(tmp_path, hours)
    found = find_partitions(str(data), None, None)
    assert keys(found) == hours
    assert found[0].path == f"{data}/day=2026-01-01/hour=22" == folder_of(str(data), hours[0])
    assert keys(find_partitions(str(data), "2026-01-01T23", "2026-01-02T00")) == hours[1:3]
    assert keys(find_partitions(str(data), None, "2026-01-01")) == hours[:2]
    assert period_of(hours, None) == HOUR and key_behind(hours[1], HOUR) == hours[2]
    assert is_last(hours[1], "2026-01-01", HOUR) and not is_last(hours[0], "2026-01-01", HOUR)
    (data / "day=2026-01-01" / "part.parquet").touch()
    with pytest.raises(PartitionError, match="found hours and beside them part.parquet"):
        find_partitions(str(data), None, None)


def plan(found: list[str], done: list[str] = (), skip: list[str] = (), period: timedelta = DAY) -> list[str]:
    """Keys that are due; a missing one in brackets."""
    from ctr.daily.partitions import Partition

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
    record = {"partition": first.key, "fingerprint": seen, "status": "trained"}
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
