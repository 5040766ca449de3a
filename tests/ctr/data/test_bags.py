"""Multi-valued columns against a row-by-row definition, in every stored form."""

import pyarrow as pa
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.reader import ParquetReader

from .rows import features, ids_of, read_in_order, taken_apart, write

quick = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LISTS = [pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.uint8())]


def labelled(**columns) -> dict:
    n = len(next(iter(columns.values())))
    return {"label": pa.array([0] * n, pa.int8()), **columns}


def bag(row, feature) -> list[int]:
    """The definition: what one stored list means."""
    if row is None:
        return [] if feature.get("missing_id") is None else [feature["missing_id"]]
    items = [item for item in row if item is not None]
    if feature.get("max_length"):
        longest = feature["max_length"]
        items = items[-longest:] if feature["kind"] == "sequence" else items[:longest]
    return items


rows_of_lists = st.lists(
    st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 120)), max_size=6)),
    min_size=1,
    max_size=60,
)


@given(
    rows=rows_of_lists,
    kind=st.sampled_from(["ids", "sequence"]),
    max_length=st.sampled_from([None, 1, 3]),
    missing_id=st.sampled_from([None, -5]),
    type_=st.sampled_from(LISTS),
    group_rows=st.integers(1, 70),
    shuffle=st.booleans(),
)
@quick
def test_lists(tmp_path_factory, rows, kind, max_length, missing_id, type_, group_rows, shuffle):
    feature = {"name": "l", "kind": kind, "max_length": max_length, "missing_id": missing_id}
    table = labelled(l=pa.array(rows, type_), row=pa.array(range(len(rows))))
    path = write(tmp_path_factory.mktemp("d"), table, row_group_size=group_rows)
    reader = ParquetReader(path, features("row", feature), 9, shuffle=shuffle, lanes=2, window_rows=16)
    found = {row["ids"]["row"][0]: row["ids"]["l"] for b in reader.epoch(3) for row in taken_apart(b)}
    assert found == {i: bag(row, feature) for i, row in enumerate(rows)}


@given(
    rows=rows_of_lists,
    max_length=st.sampled_from([None, 2]),
    shuffle=st.booleans(),
    group_rows=st.integers(1, 70),
)
@quick
def test_weights_stay_with_their_items(tmp_path_factory, rows, max_length, shuffle, group_rows):
    weights = [None if row is None else [i / 4 for i in range(len(row))] for row in rows]
    table = labelled(
        l=pa.array(rows, pa.list_(pa.int64())),
        w=pa.array(weights, pa.list_(pa.float64())),
        row=pa.array(range(len(rows))),
    )
    path = write(tmp_path_factory.mktemp("d"), table, row_group_size=group_rows)
    feature = {"name": "l", "kind": "ids", "weights": "w", "max_length": max_length, "missing_id": -1}
    reader = ParquetReader(path, features("row", feature), 9, shuffle=shuffle, lanes=2, window_rows=16)
    found = {row["ids"]["row"][0][0]: row["ids"] for b in reader.epoch(3) for row in taken_apart(b)}
    for i, row in enumerate(rows):
        pairs = [(-1, 1.0)] if row is None else list(zip(row, weights[i], strict=True))
        pairs = [pair for pair in pairs if pair[0] is not None][:max_length]
        assert found[i] == {"row": [(i, 1.0)], "l": pairs}, "a feature without weights has weight 1"


def test_fixed_size_lists_and_lists_of_strings(tmp_path):
    table = labelled(
        f=pa.array([[1, 2], [5, 6], [3, 4]], pa.list_(pa.int64(), 2)),  # pyarrow 25 cannot read a null one back
        s=pa.array([["a", None, "b"], [], None]),
        d=pa.array([["a"], ["b", "b"], None], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    )
    schema = features(
        {"name": "f", "kind": "ids"},
        {"name": "s", "kind": "ids", "dtype": "string"},
        {"name": "d", "kind": "sequence", "dtype": "string", "max_length": 1},
    )
    a, b = (xxhash.xxh64_intdigest(text.encode()) for text in "ab")
    a, b = (x - 2**64 if x >= 2**63 else x for x in (a, b))
    rows = read_in_order(write(tmp_path / "d", table), schema)
    assert [row["ids"]["f"] for row in rows] == [[1, 2], [5, 6], [3, 4]]
    assert [row["ids"]["s"] for row in rows] == [[a, b], [], []]
    assert [row["ids"]["d"] for row in rows] == [[a], [b], []]


TEXT = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("type_", TEXT, ids=str)
def test_delimited_integers(tmp_path, type_):
    texts = ["1|2|3", "", None, "7", "|8||9|", "-5", "18446744073709551615", "-9223372036854775808|007"]
    expected = [[1, 2, 3], [], [], [7], [8, 9], [-5], [-1], [-(2**63), 7]]
    path = write(tmp_path / "d", labelled(l=pa.array(texts, type_)))
    feature = {"name": "l", "kind": "ids", "delimiter": "|"}
    assert ids_of(path, features(feature), "l") == expected
    reserved = [[0] if text is None else bag for text, bag in zip(texts, expected, strict=True)]
    assert ids_of(path, features(feature | {"missing_id": 0}), "l") == reserved
    newest = [items[-1:] for items in expected]
    assert ids_of(path, features(feature | {"kind": "sequence", "max_length": 1}), "l") == newest


def test_delimited_hex_and_strings(tmp_path):
    path = write(tmp_path / "d", labelled(h=["a, ff", "10"], s=["x::y", "::"]))
    schema = features(
        {"name": "h", "kind": "ids", "delimiter": ", ", "dtype": "hex"},
        {"name": "s", "kind": "ids", "delimiter": "::", "dtype": "string"},
    )
    rows = read_in_order(path, schema)
    assert [row["ids"]["h"] for row in rows] == [[10, 255], [16]]
    x, y = (xxhash.xxh64_intdigest(text.encode()) for text in "xy")
    assert [[i % 2**64 for i in row["ids"]["s"]] for row in rows] == [[x, y], []]


BAD = [
    ({"l": ["1|x", "2"]}, {"delimiter": "|"}, "row 0", "'x'", "decimal integers"),
    ({"l": ["1", "2|18446744073709551616"]}, {"delimiter": "|"}, "row 1", "18446744073709551616", "decimal"),
    ({"l": ["1", "-9223372036854775809"]}, {"delimiter": "|"}, "row 1", "-9223372036854775809", "decimal"),
    ({"l": ["ff", "fg"]}, {"delimiter": "|", "dtype": "hex"}, "row 1", "'fg'", "hexadecimal"),
    ({"l": [[1], [2, 3]], "w": [[1.0], [1.0]]}, {"weights": "w"}, "row 1", "1 weights", "2 as in column 'l'"),
    ({"l": [[1], [2, 3]], "w": [None, [1.0, 2.0]]}, {"weights": "w"}, "row 0", "0 weights", "1 as in"),
    ({"l": [[1], [2, 3]], "w": [[1.0], [1.0, float("nan")]]}, {"weights": "w"}, "row 1", "nan", "finite"),
    ({"l": [[1], [2, 3]], "w": [[1.0], [1.0, None]]}, {"weights": "w"}, "row 1", "null", "finite"),
]


@pytest.mark.parametrize("columns, keys, row, found, expected", BAD)
def test_bad_items_are_named_or_their_rows_dropped(tmp_path, columns, keys, row, found, expected):
    path = write(tmp_path / "d", labelled(**columns))
    schema = features({"name": "l", "kind": "ids", **keys})
    with pytest.raises(DataError) as error:
        read_in_order(path, schema)
    for word in ("part-0.parquet", "row group 0", row, found, expected, "column"):
        assert word in str(error.value), str(error.value)
    reader = ParquetReader(path, schema, 2, bad_rows="skip", lanes=1)
    (batch,) = reader.epoch(0)
    assert batch.rows == 1 and len(batch.weight) == 2 and sum(reader.bad_row_counts.values()) == 1
    (good,) = taken_apart(batch)
    kept = columns["l"][1 - int(row[-1])]
    assert len(good["ids"]["l"]) == (len(kept) if isinstance(kept, list) else 1)
