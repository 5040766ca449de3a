"""Schemas: what is derived from them, and one line for each mistake."""

import pytest
from omegaconf import OmegaConf

from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.schema import FeatureConfig, Schema, SchemaConfig

NUMERIC = {"name": "age", "kind": "numeric"}


def schema(*features, **keys):
    return Schema.from_config({"features": list(features), **keys})


def test_names_tables_and_pooling():
    made = schema(
        {"name": "user"},
        {"name": "age", "kind": "numeric", "indicator": True},
        {"name": "price", "kind": "numeric", "transform": "bucketise", "boundaries": [1, 10]},
        {"name": "seen", "kind": "ids", "table": "item", "pooling": "sum", "weights": "seen_weight"},
        {"name": "item", "column": "item_id", "missing_id": 2**64 - 1},
    )
    assert made.numeric_names == ["age", "age_missing"]
    assert made.id_names == ["user", "price", "seen", "item"]
    assert made.tables == {"user": ["user"], "price": ["price"], "item": ["seen", "item"]}
    assert made.pooling == {"user": "mean", "price": "mean", "seen": "sum", "item": "mean"}
    assert made.weighted
    assert made.categorical[-1].missing_id == -1, "the bits of the unsigned number"


def test_the_same_from_mapping_omegaconf_and_dataclass():
    plain = {"labels": ["click"], "features": [{"name": "user", "dtype": "hex"}]}
    config = SchemaConfig(labels=["click"], features=[FeatureConfig(name="user", dtype="hex")])
    forms = [plain, OmegaConf.create(plain), OmegaConf.structured(config), config]
    made = [Schema.from_config(form) for form in forms]
    assert all(vars(one) == vars(made[0]) for one in made)


def test_two_features_may_read_one_column():
    made = schema({"name": "a", "column": "x"}, {"name": "b", "column": "x", "table": "other"})
    assert made.tables == {"a": ["a"], "other": ["b"]}


@pytest.mark.parametrize(
    "features, words",
    [
        ([{"name": "a", "kind": "numerc"}], ["'a'", "kind", "'numerc'", "'numeric'"]),
        ([{"name": "a", "dtype": "str"}], ["dtype", "'str'", "string"]),
        ([{"name": "a", "knd": "id"}], ["features[0]", "'knd'", "'kind'"]),
        ([{"kind": "id"}], ["features[0]", "name"]),
        ([{"name": "a"}, {"name": "a"}], ["'a'", "twice"]),
        ([NUMERIC | {"indicator": True}, {"name": "age_missing"}], ["'age_missing'", "twice"]),
        ([NUMERIC | {"table": "t"}], ["'age'", "table"]),
        ([NUMERIC | {"dtype": "hex"}], ["'age'", "dtype"]),
        ([NUMERIC | {"boundaries": [1.0]}], ["boundaries", "bucketise"]),
        ([NUMERIC | {"transform": "bucketise"}], ["boundaries", "rising"]),
        ([NUMERIC | {"transform": "bucketise", "boundaries": [2, 1]}], ["boundaries", "rising"]),
        ([NUMERIC | {"transform": "standardise", "std": 0}], ["std", "0"]),
        ([NUMERIC | {"mean": 3}], ["mean", "standardise"]),
        ([NUMERIC | {"transform": "min_max", "min": 2, "max": 2}], ["min", "max"]),
        ([NUMERIC | {"missing": float("nan")}], ["missing", "nan"]),
        ([{"name": "a", "weights": "w"}], ["'a'", "weights", "ids"]),
        ([{"name": "a", "kind": "sequence", "weights": "w"}], ["weights", "ids"]),
        ([{"name": "a", "kind": "ids", "delimiter": "|", "weights": "w"}], ["weights", "delimiter"]),
        ([{"name": "a", "delimiter": "|"}], ["'a'", "delimiter"]),
        ([{"name": "a", "kind": "ids", "max_length": 0}], ["max_length", "0"]),
        ([{"name": "a", "kind": "ids", "max_length": "ten"}], ["max_length", "ten"]),
        ([{"name": "a", "indicator": True}], ["'a'", "indicator"]),
        ([{"name": "a", "missing_id": 2**64}], ["missing_id", "64 bits"]),
        ([{"name": "a", "column": "label"}], ["'a'", "label"]),
        ([], ["features", "at least one"]),
        (["user"], ["features[0]", "str"]),
    ],
)
def test_a_mistake_is_one_line(features, words):
    with pytest.raises(SchemaError) as error:
        schema(*features)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_labels():
    with pytest.raises(SchemaError, match="labels.*empty"):
        schema({"name": "a"}, labels=[])
    with pytest.raises(SchemaError, match="labels: 'click' stands twice"):
        schema({"name": "a"}, labels=["click", "click"])
    with pytest.raises(SchemaError, match="unknown key 'label'; did you mean 'labels'"):
        schema({"name": "a"}, label="click")


def test_dropped_features_are_not_there():
    features = [NUMERIC | {"indicator": True}, {"name": "a"}, {"name": "b", "table": "a"}]
    config = SchemaConfig(features=[FeatureConfig(**one) for one in features])
    made = Schema(config, drop=["age", "a"])
    assert (made.numeric_names, made.id_names, made.tables) == ([], ["b"], {"a": ["b"]})
    mistakes = {
        ("c",): ["data.drop", "'c'", "known: age, a, b"],
        ("age_missing",): ["data.drop", "an indicator goes with its feature 'age'"],
        ("age", "a", "b"): ["data.drop", "all 3 features"],
    }
    for drop, words in mistakes.items():
        with pytest.raises(SchemaError) as caught:
            Schema(config, drop)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
