"""Filters of rows: what an expression may say, which rows stay, and one line for each mistake."""

import numpy as np
import pyarrow as pa
import pytest

from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.expressions import parse
from tessera.ctr.data.reader import ParquetReader
from tests.ctr.data.rows import features, read_in_order, taken_apart, write

DATA = {
    "label": pa.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
    "a": pa.array([1, 2, 3, 4, 5, 6]),
    "views": pa.array([0, 10, None, 30, 40, 50]),
    "country": pa.array(["de", "fr", "fr", None, "de", "it"]),
    "odd name": pa.array([0.5, 0.1, 0.9, 0.5, 0.4, 0.7]),
}


@pytest.mark.parametrize(
    "where, kept",
    [
        ("views > 0", [2, 4, 5, 6]),
        ("views > 0 and country != 'de'", [2, 6]),
        ("country == 'de' or views >= 30", [1, 4, 5, 6]),
        ("not is_null(views)", [1, 2, 4, 5, 6]),
        ("greater(utf8_length(country), 1) and column('odd name') <= .5", [1, 2, 5]),
        ("views * 2 - 20 == -a + 82 - 20", []),
        ("and_(views / 10 >= 1, starts_upper(country))", None),
        ("is_valid(country) and true_(a)", None),
        ("a + -1 < 2.5", [1, 2, 3]),
        ("label == 1", [2, 4, 6]),
        ("a / 2 == 1.5 or a / 4 > 1.4", [3, 6]),
        ("a / (views * 0) > 0", [1, 2, 4, 5, 6]),
        ("integer(a / 2) == 2", [4, 5]),
    ],
)
def test_rows_of_which_it_is_true_are_read(tmp_path, where, kept):
    path, schema = write(tmp_path, DATA, row_group_size=2), features("a")
    if kept is None:
        with pytest.raises(SchemaError, match="is no function of pyarrow.compute"):
            read_in_order(path, schema, where=where)
        return
    assert [row["ids"]["a"][0] for row in read_in_order(path, schema, where=where)] == kept


def test_the_same_rows_on_two_ranks_and_counted(tmp_path):
    draw = np.random.default_rng(0)
    table = {"label": np.zeros(900, np.float32), "a": np.arange(900), "x": draw.normal(size=900)}
    path = write(tmp_path, table, row_group_size=70)
    found, left_out = [], 0
    for rank in range(2):
        reader = ParquetReader(path, features("a"), 32, rank, 2, where="x > 0.3", window_rows=50)
        found += [row["ids"]["a"][0] for batch in reader.epoch(0) for row in taken_apart(batch)]
        left_out += reader.bad_row_counts["where"]
    assert sorted(found) == np.flatnonzero(table["x"] > 0.3).tolist() and left_out == 900 - len(found)


def test_files_may_store_a_column_in_different_forms(tmp_path):
    many = {key: pa.concat_arrays([array] * 200) for key, array in DATA.items()}
    other = many | {"country": many["country"].dictionary_encode(), "views": many["views"].cast(pa.int16())}
    path = write(tmp_path, many, other)
    where = "greater_equal(utf8_length(country), 2) and views != 0 and country != 'it'"
    rows = read_in_order(path, features("a"), where=where, window_rows=5000)
    assert [row["ids"]["a"][0] for row in rows] == [2, 5] * 400


def test_what_is_filtered_out_is_not_checked(tmp_path):
    path = write(tmp_path, DATA | {"label": pa.array([0.0, 1.0, 7.0, None, 0.0, 1.0])})
    rows = read_in_order(path, features("a"), where="label == 0 or label == 1")
    assert [row["ids"]["a"][0] for row in rows] == [1, 2, 5, 6]
    with pytest.raises(DataError, match="row 2: column 'label' found 7"):
        read_in_order(path, features("a"), where="a != 4")


@pytest.mark.parametrize(
    "where, words",
    [
        ("views >", ["data.where", "'views >'", "invalid syntax"]),
        ("1 == 1", ["names no column"]),
        ("__import__('os').system('true')", ["expected the name of a function"]),
        ("[a for a in b]", ["is not known here"]),
        ("a.b > 1", ["'a.b' is not known here"]),
        ("a[0] > 1", ["is not known here"]),
        ("0 < a < 3", ["is not known here"]),
        ("lambda: a", ["is not known here"]),
        ("equal(a, b=1)", ["values without names"]),
        ("greatr(a, 1)", ["'greatr'", "did you mean 'greater'"]),
        ("sum(a) > 1", ["'sum' is no function", "one by one"]),
        ("greater(a)", ["greater takes 2 values, found 1"]),
        ("random() > a", ["'random' is no function"]),
        ("column(a) > 1", ["one name in quotes"]),
        ("a > " + "(" * 300 + "1" + ")" * 300, ["data.where"]),
        ("x" * 10_001, ["expected at most 10,000"]),
        ("viewz > 1", ["part-0.parquet", "'viewz' (read by data.where)", "did you mean 'views'"]),
        ("a + 1", ["expected true or false", "int64"]),
        ("country > 1", ["data.where", "country > 1"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, where, words):
    path = write(tmp_path, DATA)
    with pytest.raises(SchemaError) as caught:
        ParquetReader(path, features("a"), 2, where=where)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_value_that_cannot_be_computed_is_one_line(tmp_path):
    with pytest.raises(DataError, match="data.where: divide by zero"):
        read_in_order(write(tmp_path, DATA), features("a"), where="divide(a, views) > 0")


def test_a_state_goes_on_with_the_same_filter_alone(tmp_path):
    path = write(tmp_path, DATA)
    state = ParquetReader(path, features("a"), 2, where="views > 0").state()
    ParquetReader(path, features("a"), 2, where="views > 0").load_state(state)
    with pytest.raises(DataError, match="data.where found None, expected 'views > 0' as saved"):
        ParquetReader(path, features("a"), 2).load_state(state)
    del state["where"]  # of a version that knew no such key
    ParquetReader(path, features("a"), 2).load_state(state)


def test_columns_are_those_that_are_named():
    assert parse("b > 1 and column('c d') + b < max_element_wise(e, b, 3)", "here").columns == ("b", "c d", "e")
