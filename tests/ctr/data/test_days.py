"""data.train, data.valid, data.test, data.days and data.partition, from the command line to the rows that are read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from tessera.ctr.config import load_config
from tessera.ctr.data.config import paths_of, split_days
from tessera.ctr.data.day_folders import DayFolders
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.ctr.runs.score import run_config
from tessera.ctr.train.evaluate import open_reader, read_split
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError, TesseraError
from tests.ranks import on_ranks

SCHEMA = "data.schema={labels: [label], time: null, features: [{name: row}]}"


def write_rows(path: Path, first: int, rows: int = 4) -> None:
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"label": [0, 1] * (rows // 2), "row": range(first, first + rows)}), path / "part.parquet")


def write_days(root: Path, folder: str, days: int) -> Path:
    """Day n of November holds the rows 100 n to 100 n + 3. folder: how it is called, with {} for the day."""
    for day in range(1, days + 1):
        write_rows(root / folder.format(day), 100 * day)
    return root


def config_of(root: Path, *overrides: str):
    return load_config([f"data.path={root}", SCHEMA, "data.lanes=2", "data.train=.", "data.valid=.", *overrides], "")


def days_read(root: Path, split: str, *overrides: str) -> list[int]:
    """The days whose rows a split delivers, after checking that each of their rows is there once."""
    config = config_of(root, *overrides)
    process = Process(0, 0, 1, torch.device("cpu"), None)
    reader = read_split(config, Schema(config.data.schema), process, split)
    rows = sorted(one for batch in reader.epoch(0) for one in batch.ids["row"].values().tolist())
    days = sorted({row // 100 for row in rows})
    assert rows == [100 * day + i for day in days for i in range(4)]
    return days


SIX_ONE_ONE = "data.days={train: 2026-11-01..2026-11-06, valid: [2026-11-07], test: 2026-11-08}"


def test_days_of_each_split_in_one_folder(tmp_path):
    root = write_days(tmp_path, "day=2026-11-{:02d}", 8)
    splits = [days_read(root, split, "data.test=.", SIX_ONE_ONE) for split in ("train", "valid", "test")]
    assert splits == [[1, 2, 3, 4, 5, 6], [7], [8]]
    assert days_read(root, "train", "data.days.train=2026-11-02..2026-11-03") == [2, 3]
    assert days_read(root, "valid", "data.days.train=2026-11-02") == list(range(1, 9)), "no word on valid: all"
    assert days_read(root, "train", "data.days=[2026-11-01,2026-11-03..2026-11-04]") == [1, 3, 4]
    assert days_read(root, "train", "data.train=day=2026-11-02") == [2]
    assert days_read(root, "train", "data.train=[day=2026-11-02,day=2026-11-0[45]/*.parquet]") == [2, 4, 5]


@pytest.mark.parametrize(
    ("folder", "overrides"),
    [
        ("dt=2026-11-{:02d}", ["data.partition.name=dt"]),
        ("2026-11-{:02d}", ["data.partition.name=null"]),
        ("202611{:02d}", ['data.partition={name: "", format: "%Y%m%d"}']),
        ("date=202611{:02d}", ["data.partition={name: date, format: %Y%m%d}"]),
        ("2026/11/{}", ["data.partition.name=", "data.partition.format=%Y/%m/%d"]),
        ("year=2026/month=11/day={}", ["data.partition={name: null, format: 'year=%Y/month=%m/day=%d'}"]),
        ("deeper/day=2026-11-{}/region=eu", []),
    ],
)
def test_folders_of_other_names(tmp_path, folder, overrides):
    root = write_days(tmp_path, folder, 11)
    assert days_read(root, "train", *overrides, "data.days=2026-11-02..2026-11-10") == list(range(2, 11))
    if "%Y%m%d" in str(overrides):
        assert days_read(root, "train", *overrides, "data.days=[20261103]") == [3]


@pytest.mark.parametrize(
    ("folder", "overrides", "problem"),
    [
        ("dt=2026-11-{:02d}", ["data.days=2026-11-02"],
         r"no folder is called day=YYYY-MM-DD; found dt=2026-11-01: data.partition.name=dt data"),
        ("day=2026-11-{:02d}", ["data.days=2026-11-02..2026-11-04"],
         r"found no folder day=2026-11-04; did you mean '2026-11-0"),
        ("day=2026-11-{:02d}", ["data.days=today"], r"data.days is 'today'; expected a day as 2026-01-31"),
        ("day=2026-11-{:02d}", ["data.days=2026-11-03..2026-11-01"], r"data.days has .*from an earlier day to a later"),
        ("day=2026-11-{:02d}", ["data.days={train: [2026-11-31]}"], r"data.days.train is '2026-11-31'; expected a day"),
        ("day=2026-11-{:02d}", ["data.days={trian: 2026-11-01}"], r"data.days.trian is no split; expected train"),
        ("day=2026-11-{:02d}", ["data.days=[]"], r"data.days is empty"),
        ("day=2026-11-{:02d}", ["data.partition.format=%d"], r"data.partition.format is '%d'; expected %Y, %m and %d"),
        ("day=2026-11-{:02d}", ["data.partition=dt"], r"data.partition is dt .*such as data.partition.name=dt"),
        ("day=2026-11-{:02d}", ["data.partition={format: year=%Y}"], r"data.partition is .*cannot be read as a list"),
        ("day=2026-11-{:02d}", ["data.train={a: b}"], r"data.train is .*expected a folder, file, pattern or URI"),
    ],
)  # fmt: skip
def test_what_is_no_day_is_named_with_its_key(tmp_path, folder, overrides, problem):
    root = write_days(tmp_path, folder, 3)
    with pytest.raises(TesseraError, match=problem):
        days_read(root, "train", *overrides)


def test_a_file_in_no_day_and_an_hour_that_is_none_are_named(tmp_path):
    root = write_days(tmp_path, "day=2026-11-{:02d}", 2)
    write_rows(root / "region=eu", 900)
    with pytest.raises(DataError, match="region=eu/part.parquet: data.days is set, and this file lies in no"):
        days_read(root, "train", "data.days=2026-11-01")
    (root / "region=eu").rename(root / "day=2026-11-01" / "hour=25")
    with pytest.raises(DataError, match="hour=25/part.parquet: hour=25 is no hour"):
        days_read(root, "train", "data.days=2026-11-01")


def test_hours_as_days():
    config = load_config(["data.days=[2026-10-31T22..2026-11-01T01,2026-11-02]"], "")
    expected = ["2026-10-31T22", "2026-10-31T23", "2026-11-01T00", "2026-11-01T01", "2026-11-02"]
    assert split_days(config.data, "train") == expected
    assert split_days(load_config(["data.days=2026-02-27..2026-03-01"], "").data, "test")[1:] == [
        "2026-02-28",
        "2026-03-01",
    ]
    with pytest.raises(ConfigError, match="expected a range from an earlier day"):
        load_config(["data.days=2026-02-27..2026-03-01T05"], "")


def test_hours_of_days_are_kept(tmp_path):
    for hour in (8, 9, 10):
        write_rows(tmp_path / "day=2026-11-01" / f"hour={hour}", 100 * hour)
    assert days_read(tmp_path, "train", "data.days=2026-11-01T08..2026-11-01T09") == [8, 9]
    assert days_read(tmp_path, "train", "data.days=2026-11-01") == [8, 9, 10]
    reader = ParquetReader(
        str(tmp_path), Schema.from_config({"features": [{"name": "row"}]}), 4, lanes=1, shuffle=False
    )
    order = [one for batch in reader.epoch(0) for one in batch.ids["row"].values().tolist()]
    assert order == sorted(order), "hour=10 comes last"
    assert DayFolders().find(["x", "day=2026-11-01", "hour=9"]) == (1, "2026-11-01T09")


def read_on_rank(process: Process, root: str) -> str:
    config = load_config([SCHEMA], "")
    try:
        open_reader(config, Schema(config.data.schema), process, f"{root}/{process.rank}", training=True)
    except TesseraError as error:
        return str(error)
    return "read"


def test_ranks_that_see_other_files_end_together(tmp_path):
    for rank in range(2):
        write_rows(tmp_path / "same" / str(rank), 0)
        write_rows(tmp_path / "values" / str(rank), 100 * rank)
        write_rows(tmp_path / "files" / str(rank), 0)
    pq.write_table(pa.table({"label": [1], "row": [9]}), tmp_path / "files" / "1" / "more.parquet")
    assert on_ranks(2, read_on_rank, str(tmp_path / "same")) == ["read", "read"]
    for kind in ("values", "files"):
        for rank, said in enumerate(on_ranks(2, read_on_rank, str(tmp_path / kind))):
            assert f"{kind}/{rank}/" in said and "rank 1 sees others than rank 0; start again when" in said


def test_a_run_is_scored_on_other_days_and_folders(tmp_path):
    """Also one that was saved before there was a key for the names of folders."""
    saved = OmegaConf.structured(load_config(["data.days={train: 2026-11-01}"], ""))
    plain = OmegaConf.create(OmegaConf.to_container(saved, resolve=True))
    del plain.data["partition"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(plain))
    overrides = ["data.days.test=2026-11-02..2026-11-03", "data.partition.name=dt", "data.test=[x,y/*.parquet]"]
    data = run_config(tmp_path, overrides).data
    assert split_days(data, "test") == ["2026-11-02", "2026-11-03"] and split_days(data, "train") == ["2026-11-01"]
    assert DayFolders.of(data.partition).name == "dt"
    assert paths_of(data, "test") == [f"{data.path}/x", f"{data.path}/y/*.parquet"]
    with pytest.raises(ConfigError, match="unknown key 'data.tset'; did you mean 'test'"):
        run_config(tmp_path, ["data.tset=x"])


def test_a_date_in_the_name_of_folders_is_one_line():
    with pytest.raises(
        ConfigError,
        match="data.partition.name is 'day-%Y'; expected a name alone, or null: dates are data.partition.format",
    ):
        DayFolders("day-%Y")
