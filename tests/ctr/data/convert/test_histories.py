"""Histories that a converter makes hold the newest events before each row and nothing else."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from tessera.ctr.data.convert import logs
from tessera.ctr.data.convert.histories import HistoryRule
from tessera.ctr.data.convert.logs import convert_log
from tessera.ctr.data.convert.movielens import convert_movielens
from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.convert.pipeline import Options
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.embedding.errors import ConfigError
from tests.ctr.data.convert.samples import rows, sample

HOUR = 3600
COLUMNS = ("item_id", "tags", "price", "time")


def log(folder, count=600, seed=1):
    """Write a log in no order, in two files, with users of many and of few rows, ties, and rows without a user."""
    random = np.random.default_rng(seed)
    time = random.integers(0, 40, count) * HOUR // 4
    table = pa.table(
        {
            "label": pa.array(random.integers(0, 2, count).astype(np.int8)),
            "user": pa.array([None if u == 0 else f"u{u}" for u in random.zipf(1.5, count) % 40]),
            "item_id": pa.array(random.integers(0, 50, count)),
            "tags": pa.array([[f"t{k}" for k in range(n)][::-1] for n in random.integers(0, 3, count)]),
            "price": pa.array(random.random(count).astype(np.float32)),
            "time": pa.array(time),
            "line": pa.array(np.arange(count)),
        }
    )
    folder.mkdir()
    pq.write_table(table.slice(0, count // 3), folder / "a.parquet")
    pq.write_table(table.slice(count // 3), folder / "b.parquet")
    return table.to_pylist()


def history_of(row, everything, length, where=None):
    """The slow way: look at all rows."""
    if row["user"] is None:
        return []
    same = [one for one in everything if one["user"] == row["user"] and (where is None or one[where] == 1)]
    before = sorted((one for one in same if one["time"] < row["time"]), key=lambda one: (one["time"], one["line"]))
    return before[-length:]


def check(found, everything, length, where=None):
    for row in found:
        events = history_of(row, everything, length, where)
        assert row["history_item_id"] == [one["item_id"] for one in events]
        assert row["history_tags"] == [one["tags"][0] if one["tags"] else None for one in events]
        assert row["history_price"] == [one["price"] for one in events]
        assert row["history_seconds_ago"] == [row["time"] - one["time"] for one in events]


@pytest.mark.parametrize("where", [None, "label"])
def test_histories_are_those_of_a_look_at_all_rows(tmp_path, monkeypatch, where):
    everything = log(tmp_path / "log")
    monkeypatch.setattr(logs, "_bytes", lambda log: 200 << 20)  # many parts
    rule = HistoryRule("user", COLUMNS, 5, "time", where, memory_bytes=1 << 24)
    summary = convert_log([tmp_path / "log"], tmp_path / "out", rule, "time", 0.1, 0.1, Writing())
    found = rows(tmp_path / "out")
    assert sorted(row["line"] for row in found) == list(range(len(everything)))
    check(found, everything, 5, where)
    assert summary["rows"].keys() == {"train", "valid", "test"}
    key = [(row["user"], row["time"]) for row in everything if row["user"] is not None]
    assert summary["ties"] == sum(key.count(one) > 1 for one in key)
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["ties"] == summary["ties"]
    for split, last in (("train", "valid"), ("valid", "test")):
        times = [[row["time"] for row in rows(tmp_path / "out" / one)] for one in (split, last)]
        assert times[0] == sorted(times[0]) and max(times[0]) < min(times[1])


def test_a_prepared_data_set_keeps_its_folders_and_its_schema(tmp_path):
    everything = log(tmp_path / "log")
    rule = HistoryRule("user", ("item_id", "time"), 3, "time")
    convert_log([tmp_path / "log"], tmp_path / "days", rule, "day", 0, 0, Writing())
    assert {one.name for one in (tmp_path / "days").iterdir() if one.is_dir()} == {"day=1970-01-01"}
    schema = OmegaConf.load(tmp_path / "days" / "schema.yaml").schema
    made = {one.name: one for one in schema.features}
    assert made["history_item_id"].table == "item_id" and made["history_seconds_ago"].transform == "bucketise"
    again = HistoryRule("user", ("price",), 2, "time")
    summary = convert_log([tmp_path / "days"], tmp_path / "again", again, "kept", 0, 0, Writing())
    assert summary["rows"] == {"day=1970-01-01": len(everything)}
    names = [one.name for one in OmegaConf.load(tmp_path / "again" / "schema.yaml").schema.features]
    assert names[-3:] == ["history_item_id", "history_seconds_ago", "history_price"]


@pytest.mark.parametrize(
    ("change", "error", "line"),
    [
        ({"columns": ("item",)}, SchemaError, "column 'item' not found; did you mean 'item_id'"),
        ({"time": "label2"}, SchemaError, "column 'label2' not found"),
        ({"time": "price"}, SchemaError, "column 'price' is float, expected an integer, timestamp or date"),
        ({"how": "random"}, ConfigError, "--split: found 'random', expected time, day or kept"),
        ({"how": "kept"}, ConfigError, "--split kept: found files that lie in no folder"),
        ({"length": 0}, ConfigError, "--length: found 0"),
        ({"columns": ()}, ConfigError, "--history: found no column"),
        ({"columns": ("price", "price")}, ConfigError, "expected each column once"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, change, error, line):
    log(tmp_path / "log", 30)
    given = {"columns": ("item_id",), "length": 5, "time": "time", "how": "time"} | change
    with pytest.raises(error, match=line.replace("?", r"\?")):
        rule = HistoryRule("user", given["columns"], given["length"], given["time"])
        convert_log([tmp_path / "log"], tmp_path / "out", rule, given["how"], 0.1, 0.1, Writing())
    assert not (tmp_path / "out").exists()


def test_a_row_without_a_time_is_named(tmp_path):
    table = pa.table({"user": [1, 1], "item_id": [1, 2], "time": pa.array([5, None], pa.int64())})
    pq.write_table(table, tmp_path / "log.parquet")
    rule = HistoryRule("user", ("item_id",), 5, "time")
    with pytest.raises(DataError, match=r"log.parquet row 1: column 'time' found null, expected a time"):
        convert_log([tmp_path / "log.parquet"], tmp_path / "out", rule, "day", 0.1, 0.1, Writing())


def test_movielens_histories_hold_ratings_before_the_row(tmp_path):
    rule = HistoryRule("user_id", ("item_id", "genre", "rating", "timestamp"), 20, "timestamp")
    folder = sample("ml-100k")
    with pytest.raises(ConfigError, match="--split: found random, expected time"):
        convert_movielens(folder, tmp_path / "out", Options(), history=rule)
    summary = convert_movielens(folder, tmp_path / "out", Options(), how="time", history=rule)
    assert summary["rows"] == {"train": 58284, "valid": 7233, "test": 7338}
    some = [
        one
        for split in ("train", "valid", "test")
        for one in pq.read_table(tmp_path / "out" / split).filter(pc.field("user_id") == 650).to_pylist()
    ]
    for row in some:
        same = [one for one in some if one["user_id"] == row["user_id"] and one["timestamp"] < row["timestamp"]]
        newest = sorted(one["timestamp"] for one in same)[-20:]
        assert [row["timestamp"] - ago for ago in row["history_seconds_ago"]] == newest
        assert set(row["history_item_id"]) <= {one["item_id"] for one in same}
        assert row["item_id"] not in row["history_item_id"]


def test_labels_are_no_features_of_the_schema_that_is_made(tmp_path):
    log(tmp_path / "log", 60)
    rule = HistoryRule("user", ("item_id",), 5, "time")
    convert_log([tmp_path / "log"], tmp_path / "out", rule, "day", 0, 0, Writing(), labels=("label", "line"))
    schema = OmegaConf.load(tmp_path / "out" / "schema.yaml").schema
    assert schema.labels == ["label", "line"]
    assert [one.name for one in schema.features] == ["user", "item_id", "tags", "price", "history_item_id"]


def test_lists_of_floats_are_vectors_where_they_have_one_length(tmp_path):
    stored = pa.list_(pa.float32())
    columns = {
        "picture": pa.array([None, [0.5, 1.5], [0.1, 0.2]], stored),
        "fixed": pa.array([[1.0, 2.0, 3.0]] * 3, pa.list_(pa.float64(), 3)),
        "shares": pa.array([[0.5], [0.5, 0.5], []], stored),
        "pair": pa.array([[1, 2]] * 3, pa.list_(pa.int64(), 2)),
        "tags": pa.array([["a"], [], ["b", "c"]]),
    }
    shared = {"label": pa.array([0, 1, 0], pa.int8()), "user": ["u", "u", "v"], "item": [1, 2, 3], "time": [0, 1, 2]}
    pq.write_table(pa.table(shared | columns), tmp_path / "log.parquet")
    rule = HistoryRule("user", ("item",), 5, "time")
    convert_log([tmp_path / "log.parquet"], tmp_path / "out", rule, "day", 0, 0, Writing())
    made = {one.name: one for one in OmegaConf.load(tmp_path / "out" / "schema.yaml").schema.features}
    assert [(made[name].kind, made[name].length) for name in ("picture", "fixed")] == [("vector", 2), ("vector", 3)]
    assert "shares" not in made and (made["pair"].kind, made["tags"].kind) == ("ids", "ids")
