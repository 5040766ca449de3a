"""Features that are vectors: every way to store them, nulls, and one line for what is none."""

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.column_statistics import statistics_of
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.listing import list_files
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.vectors import vectors
from tests.ctr.data.rows import features, read_in_order, taken_apart, write

ROWS = 40
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
BASE = {"label": np.zeros(ROWS, np.float32), "row": np.arange(ROWS, dtype=np.float32), "a": np.arange(ROWS)}
VECTOR = {"name": "v", "kind": "vector", "length": 3}
ROW = {"name": "row", "kind": "numeric"}


def lists(kind: pa.DataType, nulls: tuple[int, ...] = (), rows=None) -> pa.Array:
    rows = X.tolist() if rows is None else rows
    return pa.array([None if i in nulls else one for i, one in enumerate(rows)], kind)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float32(), 3),
        pa.large_list(pa.float64()),
        pa.list_(pa.float64(), 3),
        pa.list_(pa.decimal128(12, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("nulls", [(), (0, 7, 39)], ids=["", "nulls"])
def test_every_way_to_store_them_gives_the_same(tmp_path, kind, nulls):
    rows = [[Decimal(f"{x:.7f}") for x in one] for one in X.tolist()] if "decimal" in str(kind) else None
    path = write(tmp_path, BASE | {"v": lists(kind, nulls, rows)}, row_group_size=9)
    schema = features("a", {**VECTOR, "indicator": True, "missing": -1.5}, ROW)
    if nulls and pa.types.is_fixed_size_list(kind):
        with pytest.raises(SchemaError, match="column 'v' .read by feature 'v'. found nulls in .*; write it as list<"):
            ParquetReader(path, schema, 16)
        found = vectors(schema.vectors[0], [lists(kind, nulls).slice(0, 5), lists(kind, nulls).slice(5)])
        assert np.array_equal(np.flatnonzero(found.absent()), nulls) and found.bad is None
        assert np.allclose(found.values[8], X[8]) and (found.values[7] == -1.5).all()
        return
    assert schema.numeric_names == ["row", "v_missing", "v[0]", "v[1]", "v[2]"]
    expected = X.copy()
    expected[list(nulls)] = -1.5
    reader = ParquetReader(path, schema, 16, lanes=2, window_rows=11)
    seen = []
    for batch in reader.epoch(0):
        for one in taken_apart(batch):
            row, missing, *v = one["numeric"]
            seen.append(int(row))
            assert missing == (row in nulls) and np.allclose(v, expected[int(row)], atol=1e-7)
    assert sorted(seen) == list(range(ROWS)) and seen != sorted(seen)


def test_half_floats_and_integers_are_numbers_too(tmp_path):
    half, whole = X.astype(np.float16), (X * 100).astype(np.int16)
    data = BASE | {
        "h": pa.array(list(half), pa.list_(pa.float16())),
        "w": pa.array(whole.tolist(), pa.list_(pa.int16())),
    }
    schema = features({**VECTOR, "name": "h"}, {**VECTOR, "name": "w"})
    found = np.array([one["numeric"] for one in read_in_order(write(tmp_path, data), schema)], np.float32)
    assert np.array_equal(found, np.hstack([half, whole]).astype(np.float32))


def test_the_transform_takes_each_number_and_statistics_fit_it(tmp_path):
    path = write(tmp_path, BASE | {"v": lists(pa.list_(pa.float32()), (3,))})
    said = statistics_of(list_files(path).files)["v"].described()
    kept = np.delete(X, 3, 0).astype(np.float64)
    assert said["mean"] == pytest.approx(kept.mean()) and said["std"] == pytest.approx(kept.std())
    numbers = {"transform": "standardise", "mean": said["mean"], "std": said["std"], "clip": [-1.0, 1.0]}
    found = [one["numeric"] for one in read_in_order(path, features({**VECTOR, **numbers}))]
    assert np.allclose(found[4], (np.clip(X[4], -1, 1) - said["mean"]) / said["std"], atol=1e-6)
    assert found[3] == [0, 0, 0]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([[1.0, 2.0]], "column 'v' found 2 numbers, expected 3 finite numbers"),
        ([[]], "column 'v' found 0 numbers, expected 3 finite numbers"),
        ([[1.0, None, 3.0]], "column 'v' found 0.0, or null, as number 1, expected 3 finite numbers"),
        ([[1.0, 2.0, float("nan")]], "column 'v' found nan, or null, as number 2"),
        ([[1.0, 1e30, 2.0]], "or null, as number 1, expected 3 finite numbers, at most 1e+18"),
    ],
)
def test_a_row_that_is_no_vector_names_file_row_and_column(tmp_path, rows, message):
    path = write(tmp_path, BASE | {"v": lists(pa.list_(pa.float32()), (2,), X[:9].tolist() + rows + X[10:].tolist())})
    with pytest.raises(DataError, match=r"part-0.parquet row group 0 row 9: column 'v'") as caught:
        read_in_order(path, features(VECTOR))
    assert message in str(caught.value)
    reader = ParquetReader(path, features(VECTOR, ROW), 8, lanes=1, bad_rows="skip")
    kept = sorted(int(one["numeric"][0]) for batch in reader.epoch(0) for one in taken_apart(batch))
    assert kept == [i for i in range(ROWS) if i != 9] and reader.bad_row_counts == {"numeric": 1}


@pytest.mark.parametrize(
    "column, message",
    [
        (lists(pa.list_(pa.float32(), 3)), "found fixed_size_list<element: float>[3], expected a list of 4 numbers"),
        (pa.array([["x"]] * ROWS), "found list<element: string>, expected a list of 4 numbers (length: 4)"),
        (pa.array(X[:, 0]), "found float, expected a list of 4 numbers"),
    ],
)
def test_a_column_of_another_type_is_one_line_at_start(tmp_path, column, message):
    path = write(tmp_path, BASE | {"v": column})
    with pytest.raises(SchemaError, match="column 'v' .read by feature 'v'") as caught:
        ParquetReader(path, features({**VECTOR, "length": 4}), 8)
    assert message in str(caught.value).replace("<item", "<element"), str(caught.value)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"length": None}, "length is None, expected how many numbers the vector has"),
        ({"length": 0}, "length is 0, expected"),
        ({"max_length": 3}, "max_length is set, but a vector has none"),
        ({"table": "t"}, "table is set, but a vector has none"),
        ({"transform": "bucketise", "boundaries": [1.0]}, "transform bucketise makes ids of numbers"),
        ({"kind": "numeric"}, "length is set, but a numeric feature has none"),
        ({"kind": "id"}, "length is set, but a feature of kind id is not numeric"),
        ({"name": "a"}, "'a' stands twice"),
    ],
)
def test_keys_that_make_no_sense_are_one_line(keys, message):
    with pytest.raises(SchemaError) as caught:
        features("a", {**VECTOR, **keys})
    assert message in str(caught.value)
