"""Aligned sequences against a row-by-row definition, and what is said of those that do not fit together."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from tessera.ctr.data.bags import bags_of
from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.schema import Schema
from tessera.ctr.data.synthetic_histories import HistoriesConfig, draw, write_histories
from tessera.ctr.data.truth import STEPS

ITEM = {"name": "items", "kind": "sequence", "pooling": "none", "align": "h", "max_length": 3}
TEXT = ITEM | {"name": "kinds", "dtype": "string", "missing_id": -7}
PRICE = ITEM | {"name": "prices", "dtype": "float", "transform": "log1p", "missing": 2.0}
AGE = ITEM | {"name": "ages", "dtype": "float", "transform": "bucketise", "boundaries": [10, 100]}
GROUP = [ITEM, TEXT, PRICE, AGE]


def schema(*features, **more):
    return Schema.from_config({"labels": ["label"], "features": [{"name": "row"}, *features], **more})


def written(path, count=400, seed=0):
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 7, count)

    def lists(draw, type_, holes=0.0):
        made = [[None if random.random() < holes else draw() for _ in range(n)] for n in sizes]
        # A list that is missing is one without events.
        return pa.array([None if not one and i % 2 else one for i, one in enumerate(made)], type_)

    table = pa.table(
        {
            "label": pa.array(np.zeros(count, np.int8)),
            "row": pa.array(np.arange(count)),
            "items": lists(lambda: int(random.integers(50)), pa.list_(pa.int16()), 0.2),
            "kinds": lists(lambda: f"k{random.integers(3)}", pa.large_list(pa.string()), 0.2),
            "prices": lists(random.random, pa.list_(pa.float64()), 0.2),
            "ages": lists(lambda: int(random.integers(300)), pa.list_(pa.int32()), 0.1),
        }
    )
    pq.write_table(table, path, row_group_size=90)
    return table.to_pylist()


def read(path, of, rows=37, **options):
    """Return what the reader gives, by row number: name -> list of events' values."""
    found = {}
    reader = ParquetReader(path, of, rows, lanes=2, window_rows=64, **options)
    for batch in reader.epoch(0):
        number = batch.ids["row"].values().tolist()
        for feature in bags_of(of):
            ids = batch.ids[of.sequences[feature.align][0].name]
            values = batch.ids[feature.name].values() if feature.name in of.id_names else batch.numbers[feature.name]
            events = [part.tolist() for part in values.split(ids.lengths().tolist())]
            for row, one in zip(number, events, strict=False):
                found.setdefault(row, {})[feature.name] = one
    return found, reader


def test_aligned_sequences_are_cut_and_thinned_together(tmp_path):
    path = tmp_path / "a.parquet"
    stored = written(path)
    found, _ = read(path, schema(*GROUP))
    assert len(found) == len(stored)
    kinds = {f"k{i}" for i in range(3)}
    hashes = {}
    for row in stored:
        whole = zip(*(row[name] or [] for name in ("items", "kinds", "prices", "ages")), strict=True)
        events = [one for one in whole if one[0] is not None and one[3] is not None][-3:]
        here = found[row["row"]]
        assert here["items"] == [one[0] for one in events]
        expected = [2.0 if one[2] is None else np.float32(np.log1p(one[2])) for one in events]
        assert np.array_equal(np.array(here["prices"], np.float32), np.array(expected, np.float32))
        assert here["ages"] == [(one[3] >= 10) + (one[3] >= 100) for one in events]
        for one, hashed in zip(events, here["kinds"], strict=True):
            assert (one[1] is None) == (hashed == -7)
            assert hashes.setdefault(one[1], hashed) == hashed
    assert set(hashes) == kinds | {None} and len(set(hashes.values())) == 4


def test_an_empty_batch_has_sequences_too(tmp_path):
    pq.write_table(pa.table({"label": [0], "row": [0], "items": pa.array([[]], pa.list_(pa.int64()))}), tmp_path / "a")
    found, _ = read(str(tmp_path / "a"), schema(ITEM))
    assert found == {0: {"items": []}}


@pytest.mark.parametrize(
    ("column", "value", "line"),
    [
        ("kinds", ["a"], r"row 1: column 'kinds' found 1 events, expected 2 as in column 'items', with which it is"),
        ("prices", [1.0, float("nan")], r"row 1: column 'prices' found nan, expected finite numbers, at most 1e\+18"),
        ("ages", [1.0, float("inf")], r"row 1: column 'ages' found inf, expected finite numbers"),
    ],
)
def test_rows_that_do_not_fit_are_named_or_skipped(tmp_path, column, value, line):
    fine = {"items": [1, 2], "kinds": ["a", "b"], "prices": [1.0, 2.0], "ages": [1.0, 200.0]}
    columns = {name: [events, events, events] for name, events in fine.items()}
    columns[column] = [fine[column], value, fine[column]]
    pq.write_table(pa.table({"label": [0, 0, 0], "row": [0, 1, 2]} | columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet.* {line}"):
        read(tmp_path / "a.parquet", schema(*GROUP))
    found, reader = read(tmp_path / "a.parquet", schema(*GROUP), bad_rows="skip")
    assert sorted(found) == [0, 2] and dict(reader.bad_row_counts) == {"sequence": 1}
    assert [found[0][name] for name in ("items", "ages")] == [[1, 2], [0, 2]]


@pytest.mark.parametrize(
    ("features", "line"),
    [
        ([ITEM | {"kind": "ids"}], "'items': pooling none, expected mean or sum: only kind sequence"),
        ([ITEM | {"max_length": None}], "'items': pooling none and no max_length"),
        ([ITEM | {"pooling": "mean"}], "'items': align is set, but only a sequence with pooling: none"),
        ([ITEM, TEXT | {"max_length": 4}], "'kinds': max_length 4, expected 3 as 'items', with which it is aligned"),
        ([PRICE], "'prices': a sequence of numbers stands alone, expected one of ids with the same align"),
        ([ITEM, PRICE | {"pooling": "sum", "align": None}], "'prices': a sequence of numbers has pooling sum"),
        ([ITEM, PRICE | {"kind": "ids", "pooling": "mean"}], "'prices': dtype float, expected kind: sequence"),
        ([ITEM, PRICE | {"table": "t"}], "'prices': table is set, but only categorical"),
        ([ITEM, AGE | {"boundaries": []}], "'ages': boundaries"),
    ],
)
def test_schemas_that_do_not_hold_together_are_refused(features, line):
    with pytest.raises(SchemaError, match=line):
        schema(*features)


def test_columns_of_another_type_are_named(tmp_path):
    pq.write_table(pa.table({"label": [0], "row": [0], "items": [[1]], "prices": [["a"]]}), tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match="column 'prices' .* expected a list of numbers"):
        read(tmp_path / "a.parquet", schema(ITEM, PRICE))


def test_synthetic_labels_follow_the_recent_events_and_the_ceiling_is_theirs(tmp_path):
    config = HistoriesConfig(rows=6000, length=12, seed=5, valid=0.2, test=0.2)
    result = write_histories(config, tmp_path / "d", Writing())
    table = pa.concat_tables([pq.read_table(tmp_path / "d" / split) for split in ("train", "valid", "test")])
    assert np.all(np.diff(table.column("time").to_numpy()) >= 0)
    rows = table.to_pylist()
    block = draw(config, 0, 0, 6000)
    match = np.array([row["category"] in row["history_category"][-5:] for row in rows])
    recent = [sum(age <= 300 for age in row["history_seconds_ago"]) for row in rows]
    assert recent == [min(5, len(row["history_item_id"])) for row in rows]
    p = block.steps / STEPS
    assert [row["label"] for row in rows] == block.label.tolist()
    logit = np.log(p / (1 - p)) + 1.5 - 3.0 * match
    assert np.abs(logit).max() < 0.87 + 0.01  # half a uniform weight of variance 1: match is all the rest
    assert 0.4 < match.mean() < 0.7 and 0.04 < (block.lengths == 0).mean() < 0.06
    test = slice(4800, 6000)
    assert result["splits"]["test"]["auc"] == pytest.approx(roc_auc_score(block.label[test], p[test]))
    again = draw(config, 0, 100, 50)
    assert np.array_equal(again.label, block.label[100:150]) and np.array_equal(again.item, block.item[100:150])
