"""Features that are computed of columns: the same of files and of requests, null in null out, one line for mistakes."""

import json

import pyarrow as pa
import pytest

from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.serving.errors import RowError
from tessera.ctr.serving.rows import RowDecoder
from tests.ctr.data.rows import features, read_in_order, write

ROWS = 6
DAY = 86_400_000_000
DATA = {
    "label": pa.array([0.0] * ROWS),
    "price": pa.array([1.5, 2.0, None, 4.0, 10.0, 0.0]),
    "quantity": pa.array([1, 2, 3, 0, None, 5], pa.int32()),
    "at": pa.array([0, 3_600_000_000, 4 * DAY + 7_200_000_000, None, 10**15, 5], pa.timestamp("us", "Europe/Berlin")),
    "brand": pa.array(["a", "bbb", None, "dd", "e", "f"]),
}
EACH = "if_else(quantity > 0, log1p(price / quantity), None)"
FEATURES = [
    {"name": "each", "kind": "numeric", "expr": EACH, "missing": -1.0, "indicator": True},
    {
        "name": "total",
        "kind": "numeric",
        "expr": "price * quantity",
        "transform": "bucketise",
        "boundaries": [1.0, 5.0],
    },
    {"name": "hour", "expr": "hour(at)"},
    {"name": "weekday", "expr": "day_of_week(at)", "missing_id": 7},
    {"name": "band", "expr": "integer(price / 3)"},
    {"name": "loud", "expr": "utf8_upper(brand)", "dtype": "string"},
    {"name": "brand", "dtype": "string"},
    {"name": "hour_weekday", "kind": "cross", "of": ["hour", "weekday"]},
]


def decoded(decoder: RowDecoder, rows) -> list[dict]:
    found = decoder.decode(decoder.table(rows))
    numbers = [found.numeric[name].tolist() for name in decoder.schema.numeric_names]
    ids = {
        n: [one.values[a:b].tolist() for a, b in zip(one.offsets, one.offsets[1:], strict=False)]
        for n, one in found.bags.items()
    }
    return [
        {"numeric": [one[i] for one in numbers], "ids": {name: one[i] for name, one in ids.items()}}
        for i in range(found.count)
    ]


def test_files_tables_and_json_give_the_same(tmp_path):
    schema = features(*FEATURES)
    read = read_in_order(write(tmp_path, DATA, row_group_size=4), schema)
    read = [{key: one[key] for key in ("numeric", "ids")} for one in read]
    assert [one["ids"]["hour"] for one in read] == [[0], [1], [2], [], [1], [0]]  # in UTC
    assert [one["ids"]["weekday"] for one in read] == [[3], [3], [0], [7], [6], [3]]  # Monday is 0; null is missing_id
    assert [one["ids"]["band"] for one in read] == [[0], [0], [], [1], [3], [0]]
    assert [one["ids"]["total"] for one in read] == [[1], [1], [], [0], [], [0]]
    assert [one["numeric"][1] for one in read] == [0, 0, 1, 1, 1, 0] and read[3]["numeric"][0] == -1.0
    assert read[1]["numeric"][0] == pytest.approx(0.6931472)
    decoder, table = RowDecoder(schema), pa.table(DATA)
    assert decoder.columns == ["at", "brand", "price", "quantity"]
    assert decoded(decoder, table) == read
    plain = [row | {"at": row["at"] and row["at"].isoformat()} for row in table.to_pylist()]
    # One at a time: a null then is a column of nulls alone, and 4.0 may be written 4.
    for row, expected in zip(json.loads(json.dumps(plain)), read, strict=True):
        whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in row.items()}
        assert decoded(decoder, [row]) == decoded(decoder, [whole]) == [expected]


def test_columns_are_those_of_expressions_and_labels_are_refused(tmp_path):
    path = write(tmp_path, DATA, DATA | {"price": DATA["price"].cast(pa.decimal128(9, 2))})
    reader = ParquetReader(path, features(*FEATURES[:2]), 4)
    assert reader.decoder.columns == ["label", "price", "quantity"]
    numbers = [one["numeric"] for one in read_in_order(path, features(*FEATURES[:2]))]
    assert numbers[:ROWS] == numbers[ROWS:]
    with pytest.raises(SchemaError, match="'x' reads 'label', which is a label"):
        features({"name": "x", "kind": "numeric", "expr": "label + 1"})


@pytest.mark.parametrize(
    "feature, message",
    [
        ({"expr": "price /"}, "schema.features: 'x': expr is 'price /': invalid syntax"),
        ({"expr": "open('/etc/passwd')"}, "'open' is no function of pyarrow.compute"),
        ({"expr": "price.__class__"}, "'price.__class__' is not known here"),
        ({"expr": "integer(price, 3)"}, "integer takes 1 value, found 2"),
        ({"expr": "price", "column": "price"}, "column is set, but expr is, too"),
        ({"expr": "price", "kind": "ids"}, "only kinds numeric and id read it; kind is ids"),
        ({"expr": ""}, "expr is ''"),
    ],
)
def test_a_mistake_in_an_expression_is_one_line(feature, message):
    with pytest.raises(SchemaError) as caught:
        features({"name": "x", **feature})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "feature, message",
    [
        ({"expr": "price / 3"}, "feature 'x': price / 3: found double, expected an integer (dtype: int); integer(..)"),
        ({"expr": "hour(quantity)"}, "hour(quantity): Function 'hour' has no kernel matching input types (int64)"),
        ({"expr": "utf8_upper(brand)", "kind": "numeric"}, "found string, expected a number"),
        ({"expr": "prise + 1"}, "column 'prise' (read by feature 'x') found nowhere; did you mean 'price'?"),
    ],
)
def test_types_are_checked_at_the_start(tmp_path, feature, message):
    schema = features({"name": "x", **feature})
    with pytest.raises(SchemaError) as caught:
        ParquetReader(write(tmp_path, DATA), schema, 4)
    assert message in str(caught.value) and "part-0.parquet" in str(caught.value)
    if "nowhere" not in message:
        with pytest.raises(RowError) as caught:
            RowDecoder(schema).table(pa.table(DATA))
        assert message in str(caught.value)


def test_what_cannot_be_computed_or_is_not_finite_names_file_and_feature(tmp_path):
    path = write(tmp_path, DATA)
    with pytest.raises(DataError, match="row 3: column 'price / quantity' found inf, expected a finite number"):
        read_in_order(path, features({"name": "x", "kind": "numeric", "expr": "price / quantity"}))
    with pytest.raises(DataError, match="part-0.*feature 'x': divide.3, quantity.: divide by zero"):
        read_in_order(path, features({"name": "x", "expr": "divide(3, quantity)"}))
    decoder = RowDecoder(features({"name": "hour", "expr": "hour(at)"}))
    with pytest.raises(RowError, match="feature 'hour': hour.at.: Failed to parse string: 'noon'"):
        decoded(decoder, [{"at": "noon"}])
