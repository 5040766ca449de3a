"""Metrics by which training is steered: single ones and sums."""

from __future__ import annotations

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.labels import Label
from tessera.ctr.metrics.steering import higher_is_better, steering_value
from tessera.embedding.errors import ConfigError

METRICS = {"auc": 0.75, "logloss": 0.5, "normalized_entropy": 0.9, "a-b.auc": 0.6, "a-b.logloss": None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auc", 0.75),
        ("auc-logloss", 0.25),
        ("2*auc-0.5*logloss", 1.25),
        ("-logloss+auc", 0.25),
        ("auc+a-b.auc", 1.35),
        ("auc-a-b.logloss", None),
    ],
)
def test_a_sum_has_its_value_whatever_labels_are_called(name, value):
    assert steering_value(METRICS, name) == (None if value is None else pytest.approx(value))


def test_the_direction_follows_from_the_terms():
    labels = [Label("click")]
    for name in ("auc", "auc-logloss", "-logloss+2*auc", "auc-normalized_entropy"):
        assert higher_is_better(labels, name)
    for name in ("logloss", "normalized_entropy", "logloss-auc", "logloss+0.1*normalized_entropy"):
        assert not higher_is_better(labels, name)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("auc+logloss", "rewards what is good by one term and what is bad by another"),
        ("0*auc", "rewards"),
        ("auc-loglos", "is 'auc-loglos'; expected auc, logloss"),
        ("auc logloss", "is 'auc logloss'; expected auc, logloss"),
        ("auc-", "is 'auc-'; expected auc, logloss"),
        ("", "is ''; expected auc, logloss"),
    ],
)
def test_what_is_no_such_metric_is_one_line(metric, said):
    with pytest.raises(ConfigError) as error:
        load_config([f"trainer.early_stop.metric={metric}"], "")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_gauc_takes_a_group_column():
    schema = "data.schema.group=user"
    load_config(["data=synthetic", "trainer.early_stop.metric=gauc-logloss", schema], "")
    with pytest.raises(ConfigError, match=r"metric is auc\+gauc, and data.schema.group is null; expected the column"):
        load_config(["data=synthetic", "trainer.early_stop.metric=auc+gauc", "data.schema.group=null"], "")
