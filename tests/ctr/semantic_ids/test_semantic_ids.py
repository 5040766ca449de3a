"""Codebooks, the ids of items, and the ids in the rows of a data set."""

import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.schema import Schema
from tessera.ctr.semantic_ids.assign import write_semantic_ids
from tessera.ctr.semantic_ids.codebooks import Codebooks, Making, make_codebooks, prefix_ids, range_of
from tessera.ctr.semantic_ids.items import Folder, indices_in_buckets
from tessera.ctr.semantic_ids.join import join_semantic_ids
from tessera.ctr.semantic_ids.kmeans import k_means, nearest, workers
from tessera.embedding.errors import ConfigError
from tessera.kernels.reference.bits import signed
from tessera.kernels.reference.mix import mix64_number
from tessera.scripts.prepare import make_parser, prepare
from tests.ctr.data.rows import ids_of, write

SMALL = Making(levels=3, codes=8, sample=2000)


def vectors(n: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(20, dim))[draw.integers(0, 20, n)] * 3 + draw.normal(size=(n, dim))).astype(np.float32)


def items(folder, x: np.ndarray, first: int = 0, **options) -> str:
    return write(folder, {"item": np.arange(first, first + len(x)), "vector": list(x)}, **options)


def read(folder) -> dict[int, dict]:
    rows = pq.read_table(folder / "items").to_pylist()
    return {row["item"]: row for row in rows}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The vectors of 3,000 items, their files, and the folder and report of their ids."""
    folder = tmp_path_factory.mktemp("semantic_ids")
    x = vectors(3000)
    path = items(folder / "vectors", x, row_group_size=700)
    report = write_semantic_ids([path], folder / "ids", SMALL, collision_level=True)
    return x, path, folder / "ids", report


def test_k_means_finds_what_lies_apart():
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    x = np.repeat(centres, 500, 0) + np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32)
    with workers(1) as by:
        found = k_means(np.random.default_rng(1).permutation(x), 4, 1, 20, by)
        codes = nearest(x, found, by)
    means = x.reshape(4, 500, 2).mean(1)
    assert np.abs(found[np.lexsort(found.round().T)] - means[np.lexsort(means.round().T)]).max() < 1e-4
    distances = np.square(x[:, None].astype(float) - found).sum(2)
    assert np.array_equal(codes, distances.argmin(1))


def test_few_different_vectors_make_few_centroids():
    x = np.repeat(np.eye(3, dtype=np.float32), 5, 0)
    with workers(1) as by:
        books = make_codebooks(x, Making(levels=2, codes=8), by)
        codes, squares = books.encode(x, by)
    assert [len(one) for one in books.centroids] == [3, 1] and squares[1:].tolist() == [0, 0]
    assert len(np.unique(codes, axis=0)) == 3


def test_each_level_leaves_less_and_the_report_says_how_much(made):
    x, _, folder, report = made
    books = Codebooks.load(folder / "codebooks.safetensors")
    rows = read(folder)
    codes = np.array([rows[item]["codes"] for item in range(len(x))])
    left, errors = x.astype(float), []
    for level, centroids in enumerate(books.centroids):
        left = left - centroids[codes[:, level]]
        errors.append(np.square(left).sum() / np.square(x, dtype=float).sum())
    assert report["error"] == pytest.approx(errors, rel=1e-5) and 1 > errors[0] > errors[1] > errors[2]
    assert json.loads((folder / "semantic_ids.json").read_text())["version"] == books.version == report["version"]


def test_uniqueness_and_buckets(made):
    x, _, folder, report = made
    codes = [tuple(row["codes"]) for row in read(folder).values()]
    three, sizes = np.unique([one[:3] for one in codes], axis=0, return_counts=True)
    assert report["unique"] == len(three) / len(x) and report["prefixes"][-1] == len(three)
    assert report["alone"] == (sizes == 1).sum() / len(x) and report["largest_bucket"] == sizes.max()
    assert report["buckets"] == range_of(sizes) and sum(report["buckets"].values()) == len(three)
    assert len(set(codes)) == len(x) > len(three), "the collision level tells all apart"
    assert range_of([1, 1, 2, 3, 4, 5, 8, 9]) == {"1": 2, "2": 1, "3-4": 2, "5-8": 2, "9-16": 1}


def test_ids_depend_on_neither_threads_nor_files_nor_order(made, tmp_path):
    x, _, folder, _ = made
    mixed = np.random.default_rng(3).permutation(len(x))
    parts = [{"item": part, "vector": list(x[part])} for part in np.array_split(mixed, 3)]
    path = write(tmp_path / "vectors", *parts, row_group_size=333)
    write_semantic_ids([path], tmp_path / "ids", SMALL, collision_level=True, threads=2)
    assert read(tmp_path / "ids") == read(folder)
    books = "codebooks.safetensors"
    assert (tmp_path / "ids" / books).read_bytes() == (folder / books).read_bytes()
    with workers(1) as by:
        one_by_one = [Folder.load(folder).codebooks.encode(x[i : i + 1], by)[0][0].tolist() for i in range(50)]
    assert one_by_one == [read(folder)[item]["codes"][:3] for item in range(50)]


def test_other_codebooks_give_other_ids(made, tmp_path):
    x, path, folder, report = made
    ids = {sid for row in read(folder).values() for sid in row["sid"]}
    for number, making in enumerate((Making(3, 8, seed=2, sample=2000), Making(3, 8, normalise=True, sample=2000))):
        other = write_semantic_ids([path], tmp_path / f"{number}", making)
        assert other["version"] != report["version"] and other["normalise"] == making.normalise
        assert ids.isdisjoint(sid for row in read(tmp_path / f"{number}").values() for sid in row["sid"])
    books = Codebooks.load(tmp_path / "1" / "codebooks.safetensors")
    with workers(1) as by:
        assert np.array_equal(books.encode(x, by)[0], books.encode(4 * x, by)[0]), "length says nothing"


def test_ids_of_prefixes():
    codes = np.array([[0, 0, 5], [0, 0, 6], [0, 1, 5], [1, 0, 5]], np.int32)
    ids = prefix_ids(codes, "00000000deadbeef")
    before = 0xDEADBEEF
    for level, code in enumerate(codes[3].tolist(), 1):
        before = mix64_number((3 * mix64_number(before ^ level) + mix64_number(code + 1)) % 2**64)
        assert ids[3, level - 1] == signed(before)
    assert [len(set(ids[:, level])) for level in range(3)] == [2, 3, 4] and len(np.unique(ids)) == 9
    assert (prefix_ids(codes, "00000000deadbee0") != ids).all()


def test_new_items_take_ids_of_the_same_codebooks(made, tmp_path):
    x, _, folder, report = made
    again = np.concatenate([x[:100], vectors(10, seed=9)])  # 100 new items are as old ones, 10 old ones have changed
    path = write(tmp_path / "new", {"item": np.r_[3000:3100, :10], "vector": list(again)})
    later = write_semantic_ids([path], tmp_path / "later", folder)
    before, after = read(folder), read(tmp_path / "later")
    assert later["version"] == report["version"] and (later["items"], later["read"]) == (3100, 110)
    assert later["collision_level"], "as the earlier ids"
    assert all(after[item] == before[item] for item in range(10, 3000)), "items keep their ids"
    assert all(after[3000 + i]["sid"][:3] == before[i]["sid"][:3] for i in range(100))
    assert len({tuple(row["codes"]) for row in after.values()}) == 3100
    more = write_semantic_ids([items(tmp_path / "more", x[:5], 5000)], tmp_path / "more_ids", tmp_path / "later")
    assert more["items"] == 3105 and len({tuple(row["codes"]) for row in read(tmp_path / "more_ids").values()}) == 3105


def test_indices_in_buckets():
    buckets, keys = np.array([7, 7, -2, 7, 5]), np.array([30, 10, 4, 20, 1])
    assert indices_in_buckets(buckets, keys).tolist() == [2, 0, 0, 1, 0]
    earlier = np.array([7, 7, 5]), np.array([20, 99, 4]), np.array([4, 1, 0])
    assert indices_in_buckets(buckets, keys, earlier).tolist() == [6, 5, 0, 4, 1]


def test_rows_get_the_ids_of_their_items(made, tmp_path):
    _, _, folder, _ = made
    data = tmp_path / "data"
    column = pa.array([5, 2999, None, 70_000, 5], pa.int32())
    for split in ("train", "day=2026-01-02"):
        write(data / split, pa.table({"label": [0, 1, 0, 1, 1], "shown": column}), row_group_size=2, compression="zstd")
    schema = {"labels": ["label"], "features": [{"name": "shown"}]}
    (data / "schema.yaml").write_text(yaml.safe_dump({"schema": schema}))
    summary = join_semantic_ids(str(data), folder, tmp_path / "out", item="shown")
    assert summary["rows"] == {"train": 5, "day=2026-01-02": 5} and summary["without"] == 4
    file = pq.ParquetFile(tmp_path / "out" / "train" / "part-0.parquet")
    assert file.metadata.num_row_groups == 3 and file.metadata.row_group(0).column(0).compression == "ZSTD"
    rows = read(folder)
    sid = [rows[5]["sid"], rows[2999]["sid"], None, None, rows[5]["sid"]]
    assert (
        file.read().column("sid").to_pylist() == sid and file.read().column("shown").to_pylist() == column.to_pylist()
    )
    schema = Schema.from_config(yaml.safe_load((tmp_path / "out" / "schema.yaml").read_text())["schema"])
    assert ids_of(str(tmp_path / "out" / "train"), schema, "sid") == [one or [] for one in sid]
    with pytest.raises(SchemaError, match="column 'sid' is there already"):
        join_semantic_ids(str(tmp_path / "out"), folder, tmp_path / "twice", item="shown")
    with pytest.raises(SchemaError, match="column 'showm' not found.*shown"):
        join_semantic_ids(str(data), folder, tmp_path / "twice", item="showm")


def test_names_of_items_may_be_strings(tmp_path):
    names = [f"sku-{i}" for i in range(40)]
    path = write(tmp_path / "v", {"sku": names, "e": pa.array(vectors(40).tolist(), pa.list_(pa.float64(), 6))})
    write_semantic_ids([path], tmp_path / "ids", Making(2, 4), item="sku", vector="e")
    stored = pa.array(["sku-7", "?", "sku-0"]).dictionary_encode()
    data = write(tmp_path / "data", pa.table({"sku": stored, "n": [1, 2, 3]}))
    join_semantic_ids(data, tmp_path / "ids", tmp_path / "out", item="sku", name="codes")
    rows = {row["sku"]: row["sid"] for row in pq.read_table(tmp_path / "ids" / "items").to_pylist()}
    assert pq.read_table(tmp_path / "out" / "part-0.parquet").column("codes").to_pylist() == [
        rows["sku-7"],
        None,
        rows["sku-0"],
    ]
    with pytest.raises(SchemaError, match="column 'n' is integer, but the items with semantic ids are text"):
        join_semantic_ids(data, tmp_path / "ids", tmp_path / "out2", item="n")


BAD = {
    "length": ({"vector": [[1.0, 2.0], [1.0]]}, DataError, "row 1: column 'vector' found 1 numbers, expected 2"),
    "null": ({"vector": [[1.0, 2.0], None]}, DataError, "row 1: column 'vector' found 0 numbers, expected 2"),
    "nan": ({"vector": [[1.0, 2.0], [float("nan"), 0]]}, DataError, "row 1: .*null, NaN or infinite"),
    "item": ({"item": [1, None]}, DataError, "row 1: column 'item' found null, expected an item"),
    "twice": ({"item": [4, 4]}, DataError, "column 'item': item 4 found twice"),
    "type": ({"item": [0.5, 1.5]}, SchemaError, "column 'item' is double, expected integers or strings"),
    "no list": ({"vector": [1.0, 2.0]}, SchemaError, "column 'vector' is double, expected lists of numbers"),
    "no rows": (
        {"item": pa.array([], pa.int64()), "vector": pa.array([], pa.list_(pa.float32()))},
        DataError,
        "no row",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_items_are_named(tmp_path, name):
    columns, kind, message = BAD[name]
    path = write(tmp_path / "v", {"item": [1, 2], "vector": [[1.0, 2.0], [3.0, 4.0]]} | columns)
    with pytest.raises(kind, match=message):
        write_semantic_ids([path], tmp_path / "ids", Making(1, 2))
    assert not (tmp_path / "ids").exists()


def test_bad_settings_and_folders_are_named(made, tmp_path):
    _, path, folder, _ = made
    with pytest.raises(ConfigError, match="--sample: found 5, expected at least 8"):
        Making(codes=8, sample=5)
    with pytest.raises(DataError, match="no semantic_ids.json found"):
        Folder.load(tmp_path)
    narrow = items(tmp_path / "narrow", vectors(10, dim=3))
    with pytest.raises(DataError, match="found 3 numbers, expected 6"):
        write_semantic_ids([narrow], tmp_path / "ids", folder)
    options = ["semantic-ids", "--input", path, "--codebooks", str(folder), "--levels", "2", "--output", "x"]
    with pytest.raises(ConfigError, match="--levels: found with --codebooks"):
        prepare(make_parser().parse_args(options))
    changed = bytearray((folder / "codebooks.safetensors").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "changed").write_bytes(changed)
    with pytest.raises(DataError, match="the file has changed"):
        Codebooks.load(tmp_path / "changed")
    (tmp_path / "changed").write_bytes(b"")
    with pytest.raises(DataError, match="no codebooks"):
        Codebooks.load(tmp_path / "changed")


def test_the_commands(made, tmp_path):
    x, path, _, report = made
    made_by = ["--levels", "3", "--codes", "8", "--sample", "2000", "--collision-level", "--threads", "2"]
    said = prepare(make_parser().parse_args(["semantic-ids", "--input", path, "--output", f"{tmp_path}/ids", *made_by]))
    assert f"3,000 items, version {report['version']}" in said and f"{report['error'][2]:.2%} of the squares" in said
    assert f"{report['unique']:.1%} distinct" in said and "a collision level tells these apart" in said
    data = write(tmp_path / "data", {"item": [1, 2, 9999]})
    join = ["join-semantic-ids", "--input", data, "--semantic-ids", f"{tmp_path}/ids", "--item", "item"]
    said = prepare(make_parser().parse_args([*join, "--output", f"{tmp_path}/out"]))
    assert said == "join-semantic-ids: rows written: all 3; 33.33% of them without a semantic id"


def peak_of(work) -> int:
    """The most bytes that numpy and Python hold at a time during a call."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_vectors_are_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.ctr.semantic_ids.vectors.BATCH_ROWS", 400)
    peaks = []
    for n in (8_000, 20_000):
        x = np.random.default_rng(0).normal(size=(n, 48)).astype(np.float32)
        arrays = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 48)
        path = write(tmp_path / f"v{n}", {"item": np.arange(n), "vector": arrays}, row_group_size=500)
        making = Making(3, 8, sample=1000, iterations=2)
        peaks.append(peak_of(lambda p=path, m=making, n=n: write_semantic_ids([p], tmp_path / f"i{n}", m)))
    assert (peaks[1] - peaks[0]) / 12_000 < 100 < 48 * 4, "bytes of each item, of whose vectors alone have more"


def test_an_output_that_is_read_is_not_replaced(made):
    _, path, folder, report = made
    with pytest.raises(ConfigError, match="--output"):
        write_semantic_ids([path], folder, folder, overwrite=True)
    assert Folder.load(folder).codebooks.version == report["version"]
