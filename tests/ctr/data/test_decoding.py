"""Every stored form of every kind of column, against values worked out by hand or by another library."""

import datetime
import decimal
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash

from tessera.ctr.data.columns import NULL_GROUP
from tessera.ctr.data.reader import ParquetReader

from .rows import features, ids_of, read_in_order, write


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def hashed(text: str) -> int:
    return signed(xxhash.xxh64_intdigest(text.encode(), seed=0))


def labels(n: int) -> pa.Array:
    return pa.array([0, 1] * n, pa.int8())[:n]


INTEGERS = [
    (pa.int8(), [-128, 127, None]),
    (pa.uint8(), [0, 255, None]),
    (pa.int16(), [-(2**15), None, 2**15 - 1]),
    (pa.int32(), [-(2**31), 2**31 - 1, None]),
    (pa.uint32(), [0, 2**32 - 1, None]),
    (pa.int64(), [-(2**63), 2**63 - 1, None]),
    (pa.uint64(), [2**63, 2**64 - 1, None]),
    (pa.bool_(), [True, False, None]),
    (pa.dictionary(pa.int8(), pa.int64()), [5, None, 5]),
]


@pytest.mark.parametrize("type_, values", INTEGERS, ids=[str(t) for t, _ in INTEGERS])
def test_integer_ids_keep_their_64_bits_and_null_is_an_empty_bag(tmp_path, type_, values):
    path = write(tmp_path / "d", {"label": labels(3), "a": pa.array(values, type_)})
    expected = [[] if v is None else [signed(int(v))] for v in values]
    assert ids_of(path, features("a"), "a") == expected
    reserved = [[-7] if v is None else [signed(int(v))] for v in values]
    assert ids_of(path, features({"name": "a", "missing_id": -7}), "a") == reserved


TEXT = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("type_", TEXT, ids=str)
def test_strings_are_hashed(tmp_path, type_, dictionary):
    values = ["", "a", None, "a long string of more than thirty-two bytes", "äöü", "a"] * 50
    table = {"label": labels(300), "a": pa.array(values, type_)}
    path = write(tmp_path / "d", table, row_group_size=40, use_dictionary=dictionary)
    expected = [[] if v is None else [hashed(v)] for v in values]
    assert ids_of(path, features({"name": "a", "dtype": "string"}), "a") == expected
    expected = [[3] if v is None else [hashed(v)] for v in values]
    assert ids_of(path, features({"name": "a", "dtype": "string", "missing_id": 3}), "a") == expected


@pytest.mark.parametrize("type_", TEXT, ids=str)
def test_hex_digits(tmp_path, type_):
    values = ["0", "ff", "FFFFFFFFFFFFFFFF", None, "7fffffffffffffff", "05db9164"]
    path = write(tmp_path / "d", {"label": labels(6), "a": pa.array(values, type_)})
    expected = [[] if v is None else [signed(int(v, 16))] for v in values]
    assert ids_of(path, features({"name": "a", "dtype": "hex"}), "a") == expected


def test_a_column_of_type_null_is_all_missing(tmp_path):
    table = {"label": labels(2), "a": pa.nulls(2), "b": pa.nulls(2), "c": pa.nulls(2), "d": pa.nulls(2)}
    schema = features(
        "a",
        {"name": "b", "kind": "numeric", "missing": -1, "indicator": True},
        {"name": "c", "kind": "ids", "dtype": "string"},
        {"name": "d", "dtype": "string", "missing_id": 9},
    )
    for row in read_in_order(write(tmp_path / "d", table), schema):
        assert row["ids"] == {"a": [], "c": [], "d": [9]} and row["numeric"] == [-1, 1]


NUMBERS = [pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.int64(), pa.uint64(), pa.decimal128(9, 2)]


@pytest.mark.parametrize("type_", NUMBERS, ids=str)
def test_numbers_of_any_width_and_missing_values(tmp_path, type_):
    values = [1, None, 100, 0]
    scalars = [None if v is None else decimal.Decimal(v) for v in values]
    column = pa.array(scalars if pa.types.is_decimal(type_) else values).cast(type_)
    path = write(tmp_path / "d", {"label": labels(4), "x": column})
    schema = features({"name": "x", "kind": "numeric", "missing": 7.5, "indicator": True})
    rows = read_in_order(path, schema)
    assert [row["numeric"] for row in rows] == [[1, 0], [7.5, 1], [100, 0], [0, 0]]


@pytest.mark.parametrize(
    "transform, expected",
    [
        ({"transform": "log1p"}, lambda x: math.copysign(math.log1p(abs(x)), x)),
        ({"transform": "log2_square"}, lambda x: math.log(x) ** 2 if x > 2 else x),
        ({"transform": "log2_square_floor"}, lambda x: math.floor(math.log(x) ** 2) if x > 2 else x),
        ({"transform": "standardise", "mean": 3.0, "std": 2.0}, lambda x: (x - 3) / 2),
        ({"transform": "min_max", "min": -4.0, "max": 4.0}, lambda x: (x + 4) / 8),
    ],
)
def test_transforms_leave_the_missing_value_alone(tmp_path, transform, expected):
    values = [-3.5, 0.0, 1.0, 2.0, 2.5, 1e6, None]
    path = write(tmp_path / "d", {"label": labels(7), "x": pa.array(values, pa.float32())})
    rows = read_in_order(path, features({"name": "x", "kind": "numeric", "missing": 0.25, **transform}))
    for row, value in zip(rows, values, strict=True):
        wanted = 0.25 if value is None else expected(value)
        assert row["numeric"][0] == pytest.approx(wanted, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("type_", [pa.float32(), pa.float64(), pa.int32()], ids=str)
def test_bucketised_numbers_are_ids(tmp_path, type_):
    values = pa.array([-5, 0, 1, 2, 10, 11, None]).cast(type_)
    path = write(tmp_path / "d", {"label": labels(7), "x": values})
    feature = {"name": "x", "kind": "numeric", "transform": "bucketise", "boundaries": [0, 1.5, 10]}
    assert ids_of(path, features(feature), "x") == [[0], [1], [1], [2], [3], [3], []]
    assert ids_of(path, features(feature | {"missing_id": 99}), "x")[-1] == [99]


def test_a_float32_on_a_boundary_is_in_the_upper_bucket(tmp_path):
    path = write(tmp_path / "d", {"label": labels(1), "x": pa.array([0.7], pa.float32())})
    feature = {"name": "x", "kind": "numeric", "transform": "bucketise", "boundaries": [0.7]}
    assert ids_of(path, features(feature), "x") == [[1]]


def test_labels_weight_group_and_time(tmp_path):
    when = datetime.datetime(2026, 11, 1, 12, 30, 15, tzinfo=datetime.timezone.utc)
    table = {
        "click": pa.array([True, False, True]),
        "buy": pa.array([1.0, 0.0, 0.0]),
        "w": pa.array([0, 1, 2.5], pa.float64()),
        "user": pa.array(["anna", None, "ben"]),
        "at": pa.array([when] * 3, pa.timestamp("us", "UTC")),
        "a": pa.array([1, 2, 3]),
    }
    schema = features("a", labels=["click", "buy"], weight="w", group="user", time="at")
    rows = read_in_order(write(tmp_path / "d", table), schema)
    assert [row["labels"] for row in rows] == [[1, 1], [0, 0], [1, 0]]
    assert [row["weight"] for row in rows] == [0, 1, 2.5]
    assert [row["group"] for row in rows] == [hashed("anna"), NULL_GROUP, hashed("ben")]
    assert [row["time"] for row in rows] == [int(when.timestamp())] * 3


@pytest.mark.parametrize(
    "type_, stored, second",
    [
        (pa.int32(), 1700000000, 1700000000),
        (pa.timestamp("s"), 1700000000, 1700000000),
        (pa.timestamp("ms"), 1700000000999, 1700000000),
        (pa.timestamp("ns"), -1, -1),
        (pa.date32(), 2, 2 * 86400),
        (pa.date64(), 3 * 86400000, 3 * 86400),
    ],
    ids=str,
)
def test_times_are_whole_seconds(tmp_path, type_, stored, second):
    column = pa.array([stored], pa.int32() if type_.bit_width == 32 else pa.int64()).cast(type_)
    path = write(tmp_path / "d", {"label": labels(1), "a": [1], "t": column})
    assert read_in_order(path, features("a", time="t", time_from="1960-01-01"))[0]["time"] == second


def test_integer_groups(tmp_path):
    path = write(tmp_path / "d", {"label": labels(2), "a": pa.array([2**64 - 1, 5], pa.uint64())})
    assert [row["group"] for row in read_in_order(path, features("a", group="a"))] == [-1, 5]


def test_columns_whose_names_hold_dots_and_that_lie_beside_others(tmp_path):
    table = {
        "user": pa.array([1, 2]),
        "user.age": pa.array([30.0, 40.0]),
        "unread": pa.array(["x", "y"]),
        "label": labels(2),
        "tags.all": pa.array([[1, 2], [3]]),
    }
    schema = features("user", {"name": "user.age", "kind": "numeric"}, {"name": "tags.all", "kind": "ids"})
    rows = read_in_order(write(tmp_path / "d", table), schema)
    assert [row["ids"] for row in rows] == [{"user": [1], "tags.all": [1, 2]}, {"user": [2], "tags.all": [3]}]
    assert [row["numeric"] for row in rows] == [[30], [40]]


def test_files_may_store_a_column_in_different_forms(tmp_path):
    tables = [
        {"label": pa.array([0], pa.int8()), "a": pa.array([1], pa.int16()), "s": pa.array(["x"]),
         "l": pa.array([[4]], pa.list_(pa.int32()))},
        {"label": pa.array([1.0]), "a": pa.array([2], pa.uint64()), "s": pa.array(["x"], pa.large_string()),
         "l": pa.array([[5]], pa.large_list(pa.field("element", pa.int64(), nullable=False)))},
        {"label": pa.array([True]), "a": pa.array([3]), "s": pa.array(["x"]).dictionary_encode(),
         "l": pa.array([[6]], pa.list_(pa.uint64(), 1))},
    ]  # fmt: skip
    schema = features("a", {"name": "s", "dtype": "string"}, {"name": "l", "kind": "ids"})
    rows = read_in_order(write(tmp_path / "d", *tables), schema, batch_size=2)
    assert [row["ids"] for row in rows] == [{"a": [i], "s": [hashed("x")], "l": [i + 3]} for i in (1, 2, 3)]


def test_without_labels(tmp_path):
    path = write(tmp_path / "d", {"a": pa.array([1, 2])})
    rows = read_in_order(path, features("a"), drop_labels=True)
    assert [row["labels"] for row in rows] == [[0], [0]]


def test_a_batch_is_contiguous_and_of_the_stated_types(tmp_path):
    table = {"label": labels(50), "a": np.arange(50), "b": np.arange(50), "x": np.ones(50), "y": np.ones(50)}
    schema = features(*"ab", *({"name": n, "kind": "numeric"} for n in "xy"))
    for shuffle in (True, False):
        batch = next(ParquetReader(write(tmp_path / "d", table), schema, 20, shuffle=shuffle).epoch(0))
        assert batch.numeric.dtype == torch.float32 and batch.numeric.is_contiguous()
        shapes = [list(tensor.shape) for tensor in (batch.numeric, batch.labels, batch.weight)]
        assert shapes == [[20, 2], [20, 1], [20]]
        assert batch.ids.values().dtype == torch.int64 and batch.ids.lengths().dtype == torch.int32
        assert batch.ids.keys() == ["a", "b"] and batch.ids.stride() == 20 and batch.position == 20
        moved = batch.to("cpu", non_blocking=True)
        assert moved.rows == 20 and (moved.ids.values() == batch.ids.values()).all()
