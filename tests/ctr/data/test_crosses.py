"""Crosses: one id for each pair of ids, the same wherever and however it is made."""

import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.crosses import pair_ids, pair_number
from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.schema import FeatureConfig, Schema, SchemaConfig
from tessera.ctr.serving.rows import RowDecoder
from tessera.kernels.reference.mix import mix64_number
from tests.ctr.data.rows import features, read_in_order, write

CROSS = {"name": "x", "kind": "cross", "of": ["a", "b"]}
BAG = {"name": "tags", "kind": "ids"}
ALL_BITS = (1 << 64) - 1


def by_hand(a: int, b: int, number: int) -> int:
    """The formula of the docs, in Python's own integers."""
    first, second = mix64_number((a & ALL_BITS) ^ (number & ALL_BITS)), mix64_number(b & ALL_BITS)
    mixed = mix64_number(3 * first + second & ALL_BITS)
    return mixed - 2**64 if mixed >= 2**63 else mixed


def test_ids_are_those_of_the_formula_and_of_every_version():
    a, b = np.array([0, 5, -7, 2**62]), np.array([3, -5, 2**63 - 1, 0])
    number = pair_number(features("a", "b", CROSS).crosses[0])
    assert pair_ids(a, b, number).tolist() == [
        by_hand(*pair, number) for pair in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert (number, pair_ids(a[1:2], b[1:2], number).item()) == (-6648911726629502465, 6719022205628486377)


def test_symmetric_only_if_stated():
    both = [{"name": "a"}, {"name": "b"}]
    crosses = [
        features(*both, CROSS | {"of": of, "symmetric": symmetric}).crosses[0]
        for symmetric in (False, True)
        for of in (["a", "b"], ["b", "a"])
    ]
    numbers = [pair_number(cross) for cross in crosses]
    assert numbers[0] != numbers[1] and numbers[2] == numbers[3]
    a, b = np.arange(-50, 50), np.arange(100) * 7
    one_way, other = pair_ids(a, b, numbers[0]), pair_ids(b, a, numbers[0])
    assert (one_way == other).sum() == (a == b).sum() == 0
    assert (pair_ids(a, b, numbers[2], symmetric=True) == pair_ids(b, a, numbers[2], symmetric=True)).all()


def test_the_number_is_that_of_the_names_wherever_the_cross_stands():
    other = {"name": "y", "kind": "cross", "of": ["a", "c"]}
    alone, among = features("a", "b", CROSS), features("c", other, "b", "a", CROSS)
    assert pair_number(alone.crosses[0]) == pair_number(among.crosses[1]) != pair_number(among.crosses[0])
    assert among.tables == {"c": ["c"], "y": ["y"], "b": ["b"], "a": ["a"], "x": ["x"]}


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["dense", "sparse"])
def test_no_collision_in_ten_million_pairs(shape):
    if shape == "dense":
        a, b = np.divmod(np.arange(10_000_000), 2500)
    else:
        a, b = np.divmod(np.arange(10_000_000), 1000)
        a, b = a << 40, b << 20
    assert len(np.unique(pair_ids(a, b, -5))) == len(a)


def rows_of(path: str, schema: Schema, **options) -> list[list[int]]:
    return [row["ids"]["x"] for row in read_in_order(path, schema, **options)]


def test_null_where_one_is_null_and_strings_as_integers(tmp_path):
    a, b = [1, None, 3, 4, 5], ["u", "v", None, "w", "u"]
    data = {"label": pa.array([0.0] * 5), "a": pa.array(a), "b": pa.array(b)}
    schema = features("a", {"name": "b", "dtype": "string"}, CROSS)
    path = write(tmp_path, data)
    rows = read_in_order(path, schema)
    number = pair_number(schema.crosses[0])
    expected = [
        [by_hand(row["ids"]["a"][0], row["ids"]["b"][0], number)] if row["ids"]["a"] and row["ids"]["b"] else []
        for row in rows
    ]
    assert [row["ids"]["x"] for row in rows] == expected and [len(one) for one in expected] == [1, 0, 0, 1, 1]
    # The same whatever holds the integers, and whoever reads them.
    narrow = write(tmp_path / "narrow", data | {"a": pa.array(a, pa.int16())})
    assert rows_of(narrow, schema) == expected
    decoded = RowDecoder(schema).decode(RowDecoder(schema).table(pa.table(data)))
    assert decoded.bags["x"].values.tolist() == sum(expected, [])
    assert np.diff(decoded.bags["x"].offsets).tolist() == [1, 0, 0, 1, 1]


def test_bags_give_all_pairs_up_to_the_cap(tmp_path):
    tags = [[1, 2, 3], [], None, [4], [5, 6]]
    data = {
        "label": pa.array([0.0] * 5),
        "a": pa.array([7, 7, 7, None, 8]),
        "tags": pa.array(tags, pa.list_(pa.int64())),
    }
    data["more"] = pa.array([[1, 2], [1], [1], [1], [1, 2]], pa.list_(pa.int64()))
    path = write(tmp_path, data)
    schema = features("a", BAG, CROSS | {"of": ["a", "tags"], "max_length": 2})
    number = pair_number(schema.crosses[0])
    pairs = [(7, 1), (7, 2)], [], [], [], [(8, 5), (8, 6)]
    assert rows_of(path, schema) == [[by_hand(*pair, number) for pair in row] for row in pairs]
    schema = features(BAG, BAG | {"name": "more"}, CROSS | {"of": ["tags", "more"], "max_length": 5})
    number = pair_number(schema.crosses[0])
    pairs = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)], [], [], [(4, 1)], [(5, 1), (5, 2), (6, 1), (6, 2)]
    expected = [[by_hand(*pair, number) for pair in row] for row in pairs]
    assert rows_of(path, schema) == expected
    # Shuffled in windows, on two ranks: each row has its pairs.
    found = []
    for rank in range(2):
        shuffled = {"lanes": 2, "window_rows": 2, "shuffle": True, "rank": rank, "world_size": 2, "batch_size": 2}
        found += rows_of(path, schema, **shuffled)
    assert sorted(found) == sorted(expected)
    decoded = RowDecoder(schema).decode(RowDecoder(schema).table(pa.table(data)))
    assert decoded.bags["x"].values.tolist() == sum(expected, [])


def test_a_dropped_feature_is_still_crossed(tmp_path):
    data = {"label": pa.array([0.0] * 3), "a": pa.array([1, None, 3]), "b": pa.array([4, 5, 6])}
    path = write(tmp_path, data)
    whole = features("a", "b", CROSS)
    config = SchemaConfig(features=[FeatureConfig(name="a"), FeatureConfig(name="b"), FeatureConfig(**CROSS)])
    dropped = Schema(config, ["a"])
    assert (dropped.id_names, list(dropped.tables)) == (["b", "x"], ["b", "x"])
    assert rows_of(path, dropped) == rows_of(path, whole)
    assert Schema(config, ["a", "x"]).stored == [whole.categorical[1]]


@pytest.mark.parametrize(
    "cross, words",
    [
        ({"of": ["a", "bb"]}, ["'x'", "of", "'bb'", "did you mean 'b'"]),
        ({"of": ["a"]}, ["of", "['a']", "two features"]),
        ({"of": ["a", "a"]}, ["'a' twice"]),
        ({"of": ["a", "age"]}, ["'age'", "no ids", "bucketise"]),
        ({"of": ["a", "x"]}, ["'x'", "no feature that can be crossed"]),
        ({"of": ["a", "events"], "max_length": 3}, ["'events'", "one by one", "pooled"]),
        ({"of": ["a", "weighted"], "max_length": 3}, ["'weighted'", "weights"]),
        ({"of": ["a", "tags"]}, ["max_length", "pairs"]),
        ({"of": ["a", "tags"], "max_length": 0}, ["max_length 0"]),
        ({"max_length": 2}, ["max_length", "one pair"]),
        ({"column": "a"}, ["column is set"]),
        ({"missing_id": 3}, ["missing_id is set"]),
        ({"pooling": "none"}, ["pooling 'none'"]),
        ({"table": ""}, ["table is empty"]),
    ],
)
def test_a_mistake_is_one_line(cross, words):
    others = [
        {"name": "age", "kind": "numeric"},
        {"name": "events", "kind": "sequence", "pooling": "none", "max_length": 3},
        {"name": "weighted", "kind": "ids", "weights": "w"},
    ]
    with pytest.raises(SchemaError) as caught:
        features("a", "b", BAG, *others, CROSS | cross)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_keys_of_a_cross_elsewhere_are_refused():
    with pytest.raises(SchemaError, match="'a': of is set, but only kind: cross reads it"):
        features({"name": "a", "of": ["b", "c"]})
    with pytest.raises(SchemaError, match="'a': symmetric is set"):
        features({"name": "a", "symmetric": True})
