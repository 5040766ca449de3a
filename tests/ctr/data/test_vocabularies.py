"""Vocabularies: exact counts of what columns hold, and the ids that the features of a table may have."""

from argparse import ArgumentParser
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.data import vocabularies
from tessera.ctr.data.convert.command import add_kinds, prepare
from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.vocabularies import ValueCounts, Vocabulary, list_tables, write_ids_of_table
from tests.ctr.data.rows import features, read_in_order, write

ROWS = 900


def log() -> dict:
    drawn = np.random.default_rng(4)
    few, many = drawn.zipf(1.4, ROWS).clip(max=400), drawn.zipf(1.2, ROWS).clip(max=10**6)
    return {
        "label": pa.array([0.0] * ROWS),
        "number": pa.array(few, mask=drawn.random(ROWS) < 0.1),
        "wide": pa.array([(1 << 63) + int(one) for one in many], pa.uint64()),
        "text": pa.array([f"t{one}" for one in few]).dictionary_encode(),
        "digits": pa.array([f"{one:x}" for one in many]),
        "tags": pa.array([[f"t{one}", f"t{one + 1}"][: one % 3] for one in few]),
        "bars": pa.array(["|".join(str(k) for k in range(one % 4)) for one in few]),
        "price": pa.array(drawn.random(ROWS)),
    }


def stats(*arguments: str) -> str:
    parser = ArgumentParser()
    add_kinds(parser)
    return prepare(parser.parse_args(["stats", *arguments]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A log in two files, and its vocabularies of values that occur at least once and at least 3 times."""
    folder, table = tmp_path_factory.mktemp("vocabularies"), pa.table(log())
    write(folder / "data", table.slice(0, 500), table.slice(500), row_group_size=128)
    for at_least in (1, 3):
        arguments = ["--output", str(folder / f"least-{at_least}"), "--min-count", str(at_least), "--vocabulary"]
        stats(str(folder / "data"), *arguments)
    return folder


def counted(schema, folder, *names: str) -> Counter:
    """How often the reader gives each id of these features."""
    rows = read_in_order(str(folder / "data"), schema)
    return Counter(one for row in rows for name in names for one in row["ids"][name])


def test_values_are_counted_exactly_whatever_is_merged_when(monkeypatch):
    monkeypatch.setattr(vocabularies, "PENDING", 50)
    for column in (log()[name] for name in ("number", "wide", "text", "tags")):
        counts = ValueCounts()
        for first in range(0, ROWS, 70):
            counts.add(column.slice(first, 70))
        items = column.flatten() if pa.types.is_list(column.type) else column
        expected = Counter(items.drop_null().to_pylist())
        found = counts.table()
        assert dict(zip(*(found[name].to_pylist() for name in ("value", "count")), strict=True)) == expected
        assert found["value"].to_pylist() == sorted(expected) and len(counts.table(10)) < len(expected)


SAME = [{"name": "number"}, {"name": "second", "column": "number"}]
FEATURES = {
    "integers of one column": SAME,
    "integers without a sign": [{"name": "wide"}],
    "text": [{"name": "text", "dtype": "string"}],
    "hex": [{"name": "digits", "dtype": "hex"}],
    "a shared table": [{"name": "text", "dtype": "string"}, {"name": "tags", "kind": "ids", "dtype": "string"}],
}


@pytest.mark.parametrize("which", FEATURES)
def test_ids_are_those_that_the_reader_gives_often_enough(folder, which):
    schema = features(*({"table": "t", **one} for one in FEATURES[which]))
    names = schema.id_names[:1] if which == "integers of one column" else schema.id_names
    often = sorted(one for one, count in counted(schema, folder, *names).items() if count >= 3)
    found = Vocabulary(str(folder / "least-1/vocabulary")).ids_of("t", schema.categorical, 3)
    assert found.dtype == np.int64 and found.tolist() == often
    if which not in ("a shared table",):  # whose values may be rarer in each column
        other = Vocabulary(str(folder / "least-3/vocabulary")).ids_of("t", schema.categorical, 3)
        assert other.tolist() == often


def test_delimited_strings_buckets_and_what_stands_for_null(folder):
    bars = features({"name": "bars", "kind": "ids", "delimiter": "|"})
    often = sorted(one for one, count in counted(bars, folder, "bars").items() if count >= 50)
    vocabulary = Vocabulary(str(folder / "least-1/vocabulary"))
    assert often and vocabulary.ids_of("bars", bars.categorical, 50).tolist() == often
    buckets = {"name": "b", "kind": "numeric", "column": "price", "transform": "bucketise", "boundaries": [0.2, 0.5]}
    assert vocabulary.ids_of("b", features(buckets | {"missing_id": 9}).categorical, 50).tolist() == [0, 1, 2, 9]
    number = features({"name": "number", "missing_id": -7})
    assert vocabulary.ids_of("number", number.categorical, ROWS).tolist() == [-7]


def test_a_mistake_is_one_line(folder, tmp_path):
    three = Vocabulary(str(folder / "least-3/vocabulary"))
    cross = features("number", "wide", {"name": "x", "kind": "cross", "of": ["number", "wide"]}).categorical[2]
    bars = features({"name": "bars", "kind": "ids", "delimiter": "|"}).categorical[0]
    mistakes = [
        (features("number").categorical[0], 2, "threshold 2, expected at least 3: .* write it with --min-count 2"),
        (features("numbers").categorical[0], 3, "no column 'numbers'; did you mean 'number'"),
        (features("price").categorical[0], 3, "no column 'price'"),
        (cross, 3, "'x' is a cross, and vocabularies are of columns; set embedding.tables.<table>.admission.kind"),
        (bars, 3, "'bars' has a delimiter, .* write it with --min-count 1"),
    ]
    for feature, threshold, message in mistakes:
        with pytest.raises(SchemaError, match=f"embedding.admission: table 't': .*{message}"):
            three.ids_of("t", [feature], threshold)
    with pytest.raises(SchemaError, match="embedding.admission.vocabulary: .* cannot be read"):
        Vocabulary(str(tmp_path))
    (tmp_path / "vocabulary.json").write_text("[]")
    with pytest.raises(SchemaError, match=r"vocabulary.json is no list of a vocabulary"):
        Vocabulary(str(tmp_path))
    (folder / "least-1/vocabulary/wide.parquet").rename(folder / "gone.parquet")
    with pytest.raises(SchemaError, match=r"wide.parquet cannot be read"):
        Vocabulary(str(folder / "least-1/vocabulary")).ids_of("t", [features("wide").categorical[0]], 1)
    for name, why in (("price", "holds double, no ids"), ("nunber", "is not there; did you mean 'number'")):
        with pytest.raises(SchemaError, match=f"--vocabulary: column '{name}' {why}"):
            stats(str(folder / "data"), "--output", str(tmp_path / "out"), "--vocabulary", name)


def test_ids_of_tables_come_from_all_ranks(tmp_path):
    for rank, ids in enumerate(([5, -3], [], [7])):
        write_ids_of_table(tmp_path, "a/b", rank, np.array(ids, np.int64))
    list_tables(tmp_path, {"a/b": 3})
    vocabulary = Vocabulary(str(tmp_path))
    assert vocabulary.ids_of("a/b", [], 1).tolist() == [-3, 5, 7]
    with pytest.raises(SchemaError, match="threshold 2, expected 1: .* ids without counts"):
        vocabulary.ids_of("a/b", [], 2)
    with pytest.raises(SchemaError, match="has no such table"):
        vocabulary.ids_of("c", [], 1)
    assert pq.read_schema(tmp_path / "a%2Fb" / "00001.parquet").names == ["id"]
