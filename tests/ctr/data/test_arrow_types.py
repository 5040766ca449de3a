"""What writers store is read as what it says, whatever type they chose for it."""

from __future__ import annotations

import decimal
import uuid

import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.arrow_types import plain, plain_type
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.id_names import names_of_ids
from tessera.ctr.data.reader import ParquetReader

from .rows import features, read_in_order, write

TEXT = ["a", "bb", None, "", "é" * 20]
LISTS = [["a", "bb"], [], None, ["c" * 30]]
NUMBERS = [1.5, None, -2.0, 0.25]
INTEGERS = [5, None, 2**40, -7]
PAIRS, DECIMALS = [[1, 2], [3, 4]], [decimal.Decimal("1.5"), None]
extension = pa.ExtensionArray.from_storage
BIG = [2**63 + 5, 2**64 - 1, 0, None]


def rows(tmp_path, name, column, config) -> list:
    """What the reader makes of a column: ids, or numbers."""
    path = write(tmp_path / name, {"label": [0] * len(column), "other": range(len(column)), "f": column})
    feature = {"name": "f", **config}
    number = config.get("kind") == "numeric"
    return [row["numeric"] if number else row["ids"]["f"] for row in read_in_order(path, features("other", feature))]


def ids_of_text(values, stored):
    return pa.array(values, pa.string()).cast(stored)


SAME = {
    "string_view": (ids_of_text(TEXT, pa.string_view()), pa.array(TEXT), {"dtype": "string"}),
    "large_string": (ids_of_text(TEXT, pa.large_string()), pa.array(TEXT), {"dtype": "string"}),
    "binary_view": (ids_of_text(TEXT, pa.binary_view()), pa.array(TEXT), {"dtype": "string"}),
    "large_binary": (ids_of_text(TEXT, pa.large_binary()), pa.array(TEXT), {"dtype": "string"}),
    "dictionary": (pa.array(TEXT).dictionary_encode(), pa.array(TEXT), {"dtype": "string"}),
    "hex string_view": (pa.array(["ff", None, "A0"], pa.string_view()), pa.array([255, None, 160]), {"dtype": "hex"}),
    "hex fixed size": (pa.array([b"00ff", None, b"00A0"], pa.binary(4)), pa.array([255, None, 160]), {"dtype": "hex"}),
    "fixed size": (pa.array([b"ab", None, b"cd"], pa.binary(2)), pa.array(["ab", None, "cd"]), {"dtype": "string"}),
    "list of views": (pa.array(LISTS, pa.list_(pa.string_view())), pa.array(LISTS), {"kind": "ids", "dtype": "string"}),
    "list_view": (pa.array(LISTS, pa.list_view(pa.string())), pa.array(LISTS), {"kind": "ids", "dtype": "string"}),
    "large_list_view": (
        pa.array([[1, 2], [], None], pa.large_list_view(pa.int64())),
        pa.array([[1, 2], [], None]),
        {"kind": "ids"},
    ),
    "fixed size list": (pa.array(PAIRS, pa.list_(pa.int32(), 2)), pa.array(PAIRS), {"kind": "ids"}),
    "delimited view": (
        pa.array(["1,2", "", None, "3"], pa.string_view()),
        pa.array([[1, 2], [], None, [3]]),
        {"kind": "ids", "delimiter": ","},
    ),
    "half": (pa.array(NUMBERS, pa.float16()), pa.array(NUMBERS), {"kind": "numeric"}),
    "decimal": (pa.array(NUMBERS).cast(pa.decimal128(10, 3)), pa.array(NUMBERS), {"kind": "numeric"}),
    "decimal32": (pa.array(DECIMALS, pa.decimal32(5, 2)), pa.array([1.5, None]), {"kind": "numeric"}),
    "decimal256": (pa.array(DECIMALS, pa.decimal256(50, 2)), pa.array([1.5, None]), {"kind": "numeric"}),
    "decimal ids": (pa.array(INTEGERS).cast(pa.decimal128(38, 0)), pa.array(INTEGERS), {}),
    "decimal ids of 64 bits": (pa.array(BIG, pa.decimal128(20, 0)), pa.array(BIG, pa.uint64()), {}),
    "bool8": (extension(pa.bool8(), pa.array([1, 0, None], pa.int8())), pa.array([1, 0, None]), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_it_is_read_as_the_plain_type_is(tmp_path, name):
    stored, same, config = SAME[name]
    expected = dict(config)
    if config.get("dtype") == "hex" or config.get("delimiter"):
        expected = {key: value for key, value in config.items() if key not in ("dtype", "delimiter")}
    found, wanted = (rows(tmp_path, n, c, f) for n, c, f in (("found", stored, config), ("same", same, expected)))
    assert found == wanted and len(found) == len(stored)


def test_uuids_are_ids_by_their_bytes(tmp_path):
    some = [uuid.UUID(int=i).bytes for i in (1, 2, 1)]
    found = rows(tmp_path, "uuid", extension(pa.uuid(), pa.array(some, pa.binary(16))), {"dtype": "string"})
    assert found == rows(tmp_path, "bytes", pa.array(some, pa.binary()), {"dtype": "string"})
    assert found[0] == found[2] != found[1]


def test_the_labels_weight_group_and_time_may_be_of_any_type_too(tmp_path):
    table = {
        "label": pa.array([1, 0], pa.decimal128(3, 0)),
        "w": pa.array([0.5, 2.0], pa.float16()),
        "g": pa.array(["x", "y"], pa.string_view()),
        "t": pa.array([20_500, 20_501], pa.date32()),
        "a": pa.array([1, 2], pa.uint8()),
    }
    schema = features("a", weight="w", group="g", time="t")
    one, other = read_in_order(write(tmp_path / "d", table), schema)
    assert (one["labels"], one["weight"], one["time"]) == ([1], 0.5, 20_500 * 86_400)
    table["g"] = pa.array(["x", "y"])
    assert [one, other] == read_in_order(write(tmp_path / "plain", table), schema)


def test_views_inside_dictionaries_and_lists_become_plain():
    codes = pa.array([0, None, 1])
    array = pa.DictionaryArray.from_arrays(codes, pa.array(["x", "y"], pa.string_view()))
    assert plain(array).equals(pa.DictionaryArray.from_arrays(codes, pa.array(["x", "y"])))
    assert plain_type(pa.list_view(pa.list_(pa.binary_view()))) == pa.list_(pa.list_(pa.binary()))
    array = pa.array([1, 2])
    assert plain(array) is array


@pytest.mark.parametrize(
    "column, config, words",
    [
        (pa.array([1, 2], pa.duration("ms")), {"kind": "numeric"}, "found duration[ms], expected a number; write the"),
        (pa.array([1, 2], pa.time32("ms")), {"kind": "numeric"}, "found time32[ms], expected a number; write the n"),
        (pa.array([1, 2], pa.timestamp("ms")), {"kind": "numeric"}, "timestamp[ms], expected a number; write what of"),
        (pa.array([1, 2], pa.date32()), {}, "found date32[day], expected an integer (dtype: int); write what of it"),
        (pa.array([{"x": 1}, {"x": 2}]), {}, "found struct<x: int64>, expected an integer (dtype: int); write its"),
        (pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), {"kind": "ids"}, "write its keys as a list"),
        (pa.array(["a", "b"], pa.string_view()), {}, "found string_view, expected an integer (dtype: int); text is"),
        (pa.array([[1], [2]]), {}, "expected an integer (dtype: int); lists are read by features of kind ids"),
        (pa.array([1.0, 2.0]), {}, "integers with missing values must be stored as nullable integers"),
    ],
)  # fmt: skip
def test_where_the_types_end_the_line_says_how(tmp_path, column, config, words):
    path = write(tmp_path / "d", {"label": [0, 1], "f": column})
    with pytest.raises(SchemaError) as error:
        ParquetReader(path, features({"name": "f", **config}), 2)
    assert "part-0.parquet: column 'f' (read by feature 'f')" in str(error.value) and words in str(error.value)


def test_a_decimal_beyond_64_bits_is_a_bad_row(tmp_path):
    column = pa.array([1, 2**64, None, -(2**63) - 1], pa.decimal128(38, 0))
    path = write(tmp_path / "d", {"label": [0] * 4, "f": column})
    with pytest.raises(
        DataError, match="row 1: column 'f' found Decimal.'18446744073709551616'., expected an integer of 64"
    ):
        read_in_order(path, features("f"))
    reader = ParquetReader(path, features("f"), 4, bad_rows="skip", shuffle=False, lanes=1)
    (batch,) = reader.epoch(0)
    assert batch.rows == 2 and batch.ids.values().tolist() == [1] and reader.bad_row_counts == {"id": 2}


@pytest.mark.parametrize("stored", [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_an_empty_hex_string_is_missing(tmp_path, stored):
    """As null is, as an empty token of a delimited list is, and as an item of a list."""
    texts = ["ff", "", None, "10"]
    column = pa.array(texts) if pa.types.is_string(stored) else pa.array(texts).cast(stored)
    assert rows(tmp_path, "one", column, {"dtype": "hex"}) == [[255], [], [], [16]]
    assert rows(tmp_path, "own", column, {"dtype": "hex", "missing_id": 9}) == [[255], [9], [9], [16]]
    lists = pa.array([["ff", "", None], [""], []])
    assert rows(tmp_path, "list", lists, {"dtype": "hex", "kind": "ids"}) == [[255], [], []]
    lists = pa.array(["ff,,10", "", ",", None])
    assert rows(tmp_path, "text", lists, {"dtype": "hex", "kind": "ids", "delimiter": ","}) == [[255, 16], [], [], []]
    with pytest.raises(DataError, match="row 1: column 'f' found ' ', expected 1 to 16 hexadecimal digits"):
        rows(tmp_path, "blank", pa.array(["ff", " "]), {"dtype": "hex"})


def test_an_empty_string_is_a_string(tmp_path):
    one, two = rows(tmp_path, "one", pa.array(["", None]), {"dtype": "string"})
    assert len(one) == 1 and two == []


def test_names_of_ids_are_found_in_views(tmp_path):
    path = write(tmp_path / "d", {"label": [0, 1], "f": pa.array(["anna", "ben"], pa.string_view())})
    reader = ParquetReader(path, features({"name": "f", "dtype": "string"}), 2, lanes=1)
    (batch,) = reader.epoch(0)
    found = names_of_ids(reader.groups, reader.schema.categorical[0], batch.ids.values().numpy())
    assert sorted(found.values()) == ["anna", "ben"]


def test_which_columns_hold_unsigned_integers(tmp_path):
    big = np.array([2**63, 1], np.uint64)
    table = {"label": [0, 1], "a": big, "b": [1, 2], "c": pa.array([[2**63], []], pa.list_(pa.uint64())), "d": big}
    path = write(tmp_path / "d", table, table | {"d": [1, 2]})
    schema = features("a", "b", {"name": "c", "kind": "ids"}, "d")
    assert ParquetReader(path, schema, 2).groups.unsigned == {"a", "c"}
