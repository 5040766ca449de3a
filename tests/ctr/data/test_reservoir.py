"""The reservoir: a uniform sample of bounded size, whatever the order of partitions; and its rows beside new ones."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.reservoir import PARTITION, PRIORITY, add_to_reservoir
from tessera.ctr.data.schema import FeatureConfig, Schema, SchemaConfig
from tessera.embedding.errors import ConfigError

SCHEMA = Schema(
    SchemaConfig(features=[FeatureConfig(name="user"), FeatureConfig(name="tags", kind="ids", dtype="string")])
)
ROWS = {"day=2026-01-01": 700, "day=2026-01-02": 300, "day=2026-01-03": 1000}


def write(folder: Path, name: str, rows: int, first: int, user_type=None, files: int = 2) -> str:
    """Users are numbered through; row groups of 64."""
    users = np.arange(first, first + rows)
    table = pa.table(
        {
            "unused": pa.array(np.zeros(rows)),
            "user": pa.array(users, user_type or pa.int64()),
            "label": pa.array((users % 2).astype(np.int8)),
            "tags": pa.array([[str(u % 7), "x"][: u % 3] for u in users.tolist()]),
        }
    )
    (folder / name).mkdir(parents=True)
    cut = rows // files
    for i in range(files):
        part = table.slice(i * cut, cut if i < files - 1 else None)
        pq.write_table(part, folder / name / f"part-{i}.parquet", row_group_size=64)
    return str(folder / name)


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> dict[str, str]:
    folder, first, paths = tmp_path_factory.mktemp("days"), 0, {}
    for name, rows in ROWS.items():
        paths[name] = write(folder, name, rows, first)
        first += rows
    return paths


def sample(days: dict[str, str], order, folder: Path, size: int = 100, seed: int = 1) -> Path:
    before = None
    for i, name in enumerate(order):
        after = folder / f"{size}-{seed}-{'-'.join(n[-2:] for n in order[: i + 1])}.parquet"
        assert add_to_reservoir(before, days[name], name, SCHEMA, size, seed, after) <= size
        before = after
    return before


def test_the_order_of_partitions_and_doing_it_again_do_not_matter(days, tmp_path):
    expected = sample(days, list(days), tmp_path).read_bytes()
    for order in permutations(days):
        assert sample(days, order, tmp_path).read_bytes() == expected
    again = sample(days, list(days), tmp_path)
    add_to_reservoir(again, days["day=2026-01-02"], "day=2026-01-02", SCHEMA, 100, 1, again)
    assert again.read_bytes() == expected
    assert sample(days, list(days), tmp_path, seed=2).read_bytes() != expected
    assert not list(tmp_path.glob(".*")), "nothing half written stays"


def test_rows_are_those_of_the_files_with_the_smallest_priorities(days, tmp_path):
    found = pq.read_table(sample(days, list(days), tmp_path, size=150))
    every = pq.read_table(sample(days, list(days), tmp_path, size=5000))
    assert found.num_rows == 150 and every.num_rows == 2000
    assert found.equals(every.slice(0, 150))
    assert sorted(every["user"].to_pylist()) == list(range(2000))
    priority = every[PRIORITY].to_numpy()
    assert (np.diff(priority.astype(np.float64)) >= 0).all()
    for row in found.to_pylist():
        user = row["user"]
        assert row["label"] == user % 2 and row["tags"] == [str(user % 7), "x"][: user % 3]
        assert row[PARTITION] == f"day=2026-01-0{1 if user < 700 else 2 if user < 1000 else 3}"
        assert "unused" not in row


def test_it_is_a_uniform_sample(days, tmp_path):
    """Over 60 seeds each row is in as often as the others: chi-square of 20 blocks of 100 rows, and of positions."""
    size, seeds = 200, 60
    counts = np.zeros(2000)
    for seed in range(seeds):
        path = tmp_path / "sample.parquet"
        for number, (name, folder) in enumerate(days.items()):
            add_to_reservoir(path if number else None, folder, name, SCHEMA, size, seed, path)
        counts[pq.read_table(path, columns=["user"])["user"].to_numpy()] += 1
    assert counts.sum() == size * seeds
    share = size / 2000
    for cells in (counts.reshape(20, 100), counts.reshape(100, 20).T):  # in order, and by number modulo 20
        sums = cells.sum(1)
        # Without replacement the variance of a cell is that of a hypergeometric draw.
        variance = seeds * size * 0.05 * 0.95 * (2000 - size) / 1999
        chi_square = float(((sums - size * seeds * 0.05) ** 2).sum() / variance) * 0.95
        assert 5 < chi_square < 44  # 19 degrees of freedom: 0.1 % on either side
    assert abs(counts.var() / (seeds * share * (1 - share)) - 1) < 0.15


def test_types_may_widen_and_what_does_not_go_together_is_named(days, tmp_path):
    narrow = write(tmp_path, "narrow", 50, 0, pa.int32(), files=1)
    path = tmp_path / "r.parquet"
    add_to_reservoir(None, narrow, "narrow", SCHEMA, 30, 1, path)
    add_to_reservoir(path, days["day=2026-01-01"], "wide", SCHEMA, 30, 1, path)
    assert pq.read_schema(path).field("user").type == pa.int64()
    before = path.read_bytes()
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"user": ["a"], "label": [1], "tags": [["x"]]}), bad)
    with pytest.raises(DataError, match=r"column 'user' .* found string, expected an integer"):
        add_to_reservoir(path, str(bad), "bad", SCHEMA, 30, 1, path)
    with pytest.raises(ConfigError, match="size is 0; expected at least 1"):
        add_to_reservoir(path, narrow, "narrow", SCHEMA, 0, 1, path)
    assert path.read_bytes() == before


def epoch(reader: ParquetReader) -> list[tuple[int, float, int]]:
    """(user, weight, number) in order of delivery."""
    found = []
    for batch in reader.epoch(0):
        users = batch.ids["user"].values().tolist()
        found += list(zip(users, batch.weight[: batch.rows].tolist(), batch.number[: batch.rows].tolist(), strict=True))
        assert batch.number[batch.rows :].tolist() == [-1] * (len(batch.number) - batch.rows)
    return found


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_reader_takes_replayed_rows_with_their_weight(days, tmp_path, shuffle):
    """Each new row once with weight 1 and its number in the files, each replayed one with the weight, behind them."""
    replay, new = sample(days, list(days)[:2], tmp_path), days["day=2026-01-03"]
    options = {"batch_size": 96, "seed": 3, "lanes": 6, "window_rows": 50, "shuffle": shuffle, "numbered": True}
    more = {"replay": str(replay), "replay_weight": 0.25}
    whole = epoch(ParquetReader(new, SCHEMA, **options, **more))
    replayed = pq.read_table(replay)["user"].to_pylist()
    expected = {(1000 + i, 1.0, i) for i in range(1000)} | {(u, 0.25, 1000 + i) for i, u in enumerate(replayed)}
    assert set(whole) == expected and len(whole) == len(expected)
    parts = [epoch(ParquetReader(new, SCHEMA, rank=r, world_size=2, **options, **more)) for r in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    alone = epoch(ParquetReader(new, SCHEMA, **options))
    assert {number for _, _, number in alone} == set(range(1000))
    in_full = epoch(ParquetReader(new, SCHEMA, **options, replay=str(replay)))
    assert {weight for _, weight, _ in in_full} == {1.0}


def test_weights_of_rows_are_multiplied_and_bad_rows_have_no_number(tmp_path):
    schema = Schema(SchemaConfig(weight="w", features=[FeatureConfig(name="user")]))

    def table(users, labels, weights) -> pa.Table:
        return pa.table({"user": users, "label": labels, "w": weights})

    pq.write_table(table([1, 2, 3], [0, 1, 7], [1.0, 2.0, 3.0]), tmp_path / "new.parquet")
    pq.write_table(table([4, 5], [9, 1], [4.0, 8.0]), tmp_path / "old.parquet")
    reader = ParquetReader(
        str(tmp_path / "new.parquet"),
        schema,
        batch_size=5,
        bad_rows="skip",
        replay=str(tmp_path / "old.parquet"),
        replay_weight=0.5,
        numbered=True,
    )
    assert sorted(epoch(reader)) == [(1, 1.0, 0), (2, 2.0, 1), (5, 4.0, 4)]
    assert reader.bad_row_counts == {"label": 2}
