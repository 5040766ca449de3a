"""Several labels in the reader: masks where one is null, rows that contradict a funnel, and schemas that cannot be."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.label_spaces import joint_label, joint_logit, known_in_space
from tessera.ctr.data.labels import joint_name, labels_of
from tessera.ctr.data.reader import ParquetReader
from tests.ctr.data.rows import features, write

FUNNEL = ["click", {"name": "buy", "where": "click"}]
COLUMNS = {
    "click": pa.array([1, 1, 0, None, 1, 0, 1], pa.int8()),
    "buy": pa.array([1, None, 0, None, 0, None, 1], pa.int8()),
    "user": pa.array(range(7)),
}


def batches(path: str, labels, **options):
    reader = ParquetReader(path, features("user", labels=labels), 4, lanes=1, shuffle=False, **options)
    return list(reader.epoch(0)), reader


def test_a_null_is_unknown_and_padding_is_known(tmp_path):
    path = write(tmp_path / "d", COLUMNS, row_group_size=3)
    (first, second), _ = batches(path, FUNNEL)
    assert first.labels.tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]
    assert first.known.tolist() == [[True, True], [True, False], [True, True], [False, False]]
    assert second.rows == 3 and second.labels[:3].tolist() == [[1, 0], [0, 0], [1, 1]]
    assert second.known.tolist() == [[True, True], [True, False], [True, True]]
    reader = ParquetReader(path, features("user", labels=FUNNEL), 8, 1, 2, lanes=2, shuffle=False)
    (padded,) = reader.epoch(0)
    rows = padded.rows
    assert rows < 4 and padded.known[rows:].all() and padded.labels[rows:].sum() == padded.weight[rows:].sum() == 0
    moved = second.to(torch.device("cpu"))
    assert torch.equal(moved.known, second.known)


def test_masks_follow_their_rows_in_a_shuffle(tmp_path):
    rows = 300
    draw = np.random.default_rng(0)
    unknown = draw.random(rows) < 0.3
    columns = {"click": np.arange(rows) % 2, "buy": pa.array(np.arange(rows) % 3 % 2, mask=unknown)}
    path = write(tmp_path / "d", columns | {"user": np.arange(rows)}, row_group_size=40)
    reader = ParquetReader(path, features("user", labels=FUNNEL), 32, lanes=4, window_rows=64)
    seen = 0
    for batch in reader.epoch(0):
        users = batch.ids.values().numpy()
        assert (batch.known[: batch.rows, 1].numpy() == ~unknown[users]).all()
        expected = np.where(unknown[users], 0, users % 3 % 2)
        assert (batch.labels[: batch.rows, 1].numpy() == expected).all()
        seen += batch.rows
    assert seen == rows


def test_no_null_gives_no_mask_where_none_is_allowed(tmp_path):
    columns = COLUMNS | {"click": pa.array([1, 1, 0, 0, 1, 0, 1])}
    (first, _), _ = batches(write(tmp_path / "d", columns), ["click"])
    assert first.known is None


@pytest.mark.parametrize("labels", [["click"], [{"name": "click", "nulls": "bad"}, "buy"]])
def test_a_null_is_a_bad_row_where_no_mask_is_allowed(tmp_path, labels):
    path = write(tmp_path / "d", COLUMNS)
    with pytest.raises(DataError, match=r"part-0.parquet row group 0 row 3: column 'click' found null, expected 0"):
        batches(path, labels)
    found, reader = batches(path, labels, bad_rows="skip")
    assert sum(batch.rows for batch in found) == 6 and reader.bad_row_counts == {"label": 1}


def test_one_label_may_be_unknown_if_asked_for(tmp_path):
    (first, _), _ = batches(write(tmp_path / "d", COLUMNS), [{"name": "c", "column": "click", "nulls": "unknown"}])
    assert first.known[:, 0].tolist() == [True, True, True, False]


def test_a_purchase_without_a_click_is_bad_for_models_of_funnels(tmp_path):
    columns = COLUMNS | {"click": pa.array([1, 1, 0, None, 1, 0, 0], pa.int8())}
    path = write(tmp_path / "d", columns)
    batches(path, FUNNEL)
    line = r"part-0.parquet row group 0 row 6: column 'buy' found 1, expected 0 where 'click' is 0"
    with pytest.raises(DataError, match=line):
        batches(path, FUNNEL, nested=True)
    found, reader = batches(path, FUNNEL, nested=True, bad_rows="skip")
    assert sum(batch.rows for batch in found) == 6 and reader.bad_row_counts == {"label": 1}


def test_a_number_is_read_as_it_is_and_must_be_finite(tmp_path):
    labels = [{"name": "price", "loss": "mse"}, "click"]
    price = pa.array([1.5, -2.0, None, 3e4, 0.0, 1.0, 2.0])
    (first, _), _ = batches(write(tmp_path / "d", COLUMNS | {"price": price}), labels)
    assert first.labels[:, 0].tolist() == [1.5, -2.0, 0.0, 3e4] and first.known[:, 0].tolist() == [1, 1, 0, 1]
    infinite = pa.array([1.5, np.inf, None, 3e4, 0.0, 1.0, 2.0])
    with pytest.raises(DataError, match="row 1: column 'price' found inf, expected a number of at most 1e[+]18"):
        batches(write(tmp_path / "e", COLUMNS | {"price": infinite}), labels)


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ([{"name": "buy", "where": "clik"}, "click"], "'buy': where is 'clik'; expected all or another label.*'click'"),
        ([{"name": "buy", "where": "buy"}, "click"], "'buy': where is 'buy'; expected all or another label"),
        ([{"name": "a", "where": "b"}, {"name": "b", "where": "a"}], "'a' counts where it counts itself, in a circle"),
        (["click", "click"], "'click' stands twice; names must differ"),
        (["a.b", "click"], "'a.b' names a task; expected a name without dots"),
        (["all", "click"], "'all' names a task"),
        ([{"name": "a", "wheer": "b"}], r"labels\[0\]: unknown key 'wheer'.*'where'"),
        ([{"where": "b"}, "b"], r"labels\[0\]: name is missing"),
        ([{"name": "a", "loss": "hinge"}], r"labels\[0\].loss is 'hinge'; expected cross_entropy, focal"),
        ([{"name": "a", "weight": -1}], r"labels\[0\].weight is -1.0; expected at least 0"),
        ([{"name": "a", "gamma": 1}], "'a': gamma is set, but only loss focal read it"),
        ([{"name": "a", "loss": "jrc", "mix": 1.5}], r"labels\[0\].mix is 1.5; expected a number from 0 to 1"),
        ([{"name": "a", "loss": "mse"}, {"name": "b", "where": "a"}], "'b' counts where 'a' is 1, which is a number"),
        (["a", {"name": "b", "where": "a"}, "a_and_b"], "'a_and_b' is the name of the joint probability"),
        ([3], r"labels\[0\]: found int, expected a column's name"),
    ],
)
def test_labels_that_cannot_be_are_refused(labels, line):
    with pytest.raises(SchemaError, match=line):
        labels_of(labels)


def test_spaces_and_products_along_a_funnel():
    labels = labels_of(["click", {"name": "cart", "where": "click"}, {"name": "buy", "where": "cart"}])
    values = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=torch.float32)
    known = torch.ones(6, 3, dtype=torch.bool)
    known[4, 2] = known[5, 1] = known[5, 2] = False
    assert joint_name(labels, 2) == "click_and_cart_and_buy"
    assert known_in_space(labels, 2, values, known).tolist() == [True, True, False, False, False, False]
    value, mask = joint_label(labels, 2, values, known)
    assert value.tolist() == [1, 0, 0, 0, 0, 0] and mask.tolist() == [True, True, True, True, False, False]
    logits = torch.randn(6, 3, dtype=torch.float64)
    product = torch.sigmoid(logits).prod(1)
    torch.testing.assert_close(joint_logit(labels, 2, logits), torch.logit(product))
