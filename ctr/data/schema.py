"""Describe the columns of a data set: labels, numeric features and categorical features.

`SchemaConfig` is the form users write in `conf/data/*.yaml`; `Schema` is the same after the defaults are
filled in and the contradictions are refused. Nothing here opens a file: `tessera.ctr.data.files` compares the footers
with the schema.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.labels import MISSING, labels_of
from tessera.ctr.data.times import TimeRule
from tessera.embedding.errors import did_you_mean
from tessera.embedding.settings import setting

KINDS = ("numeric", "id", "ids", "sequence")
DTYPES = ("int", "hex", "string", "float")
POOLINGS = ("mean", "sum", "none")
LARGEST = 1e18  # of numbers that models read and of weights; the square of a larger one overflows float32
TRANSFORMS = ("none", "log1p", "log2_square", "log2_square_floor", "standardise", "min_max", "bucketise")


@dataclass
class FeatureConfig:
    """One feature. Two features may read one column, and two categorical features may share a table."""

    name: str = MISSING  # of the feature, in reports, in the plan and in the model
    # numeric | id (one per row) | ids (any number per row) | sequence (ordered, newest last)
    kind: str = "id"
    column: str | None = None  # default: the name
    # How ids are stored. int: integers of any width, the 64 bits are kept; hex: at most 16 hex digits;
    # string: XXH64 with seed 0 of the bytes; float: a sequence of numbers, such as prices or seconds since.
    dtype: str = "int"
    delimiter: str | None = None  # ids and sequence stored as one string: what stands between the items
    weights: str | None = None  # ids: a list column of as many weights
    max_length: int | None = None  # ids: the first so many are kept; sequence: the last so many
    # mean | sum: of a bag's rows, for the model | none: a sequence reaches a model that reads sequences event by event
    pooling: str = "mean"
    align: str | None = None  # pooling none: sequences of one name here have the same events; default: the name
    missing: float = 0.0  # numeric null: the value the model sees, after the transform
    # categorical null: this id; None gives an empty bag, and takes an event out of all aligned sequences
    missing_id: int | None = None
    indicator: bool = False  # numeric: one more numeric column <name>_missing, 1 where the value was null
    # none | log1p: sign(x) ln(1+|x|) | log2_square: ln(x)^2 where x > 2 (natural) | log2_square_floor: its whole part
    # where x > 2 | standardise: (x-mean)/std | min_max: (x-min)/(max-min)
    # | bucketise: the number of boundaries <= x, as a categorical id
    transform: str = "none"
    mean: float = 0.0  # transform standardise: subtracted from the value
    std: float = 1.0  # transform standardise: divides it then
    min: float = 0.0  # transform min_max: the value that becomes 0
    max: float = 1.0  # transform min_max: the value that becomes 1
    boundaries: list[float] = field(default_factory=list)  # transform bucketise: where buckets begin, rising
    table: str | None = None  # embedding table; default: the name


@dataclass
class Feature(FeatureConfig):
    """One feature of a validated schema: `column` is filled in and, where the feature gives ids, `table`."""

    column: str = ""


@dataclass
class SchemaConfig:
    """The columns of a data set."""

    labels: list[Any] = setting(["label"], "columns of 0 and 1, or mappings with the keys below; one is one task")
    weight: str | None = setting(None, "sample weight")
    group: str | None = setting(None, "group of GAUC, an integer or a string")
    time: str | None = setting(None, "event time: an integer in time_unit, a timestamp or a date")
    time_unit: str = setting("s", "of integers since 1970, UTC: s | ms | us | ns; timestamps know their own")
    time_from: str = setting("1990-01-01", "a row with an earlier time is bad; YYYY-MM-DD")
    time_to: str = setting("2100-01-01", "a row with this time or a later one is bad; YYYY-MM-DD")
    time_jump_days: float = setting(
        365.0, "few rows that lie more than so many days beyond all others of their window are bad"
    )
    features: list[FeatureConfig] = setting([], "what the model reads, one by one")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known word that is probably meant, or all known words."""
    known = list(known)
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return did_you_mean(word, known, f"known: {shown or 'none'}", lead="")


class Schema:
    """A validated schema.

    Attributes:
        tasks: the labels, in order (`labels.py`); labels: the columns that hold them
        weight, group, time: column names, None where absent
        times: what is known of the column of times, and which ones are plausible; None without one
        numeric: the numeric features in order, without bucketised ones
        categorical: the features that give ids, in order, bucketised numerics among them
        sequences: group -> its aligned sequences with pooling none, in order; cut to the same length
        number_sequences: those of them that are numbers, keys of `Batch.numbers`, in order
        pooled_names: keys of `Batch.ids` whose rows are pooled, in order
        numeric_names: columns of `Batch.numeric`; an indicator follows its feature
        id_names: keys of `Batch.ids`
        tables: embedding table -> names of the categorical features that look into it
        pooling: categorical feature -> 'sum' | 'mean'
        weighted: whether `Batch.ids` carries weights
    """

    def __init__(self, config: SchemaConfig, drop: Sequence[str] = ()):
        """drop: names of features that are left out; their columns are not read.

        Raises SchemaError, one line: the schema contradicts itself, or has no feature of a name to drop.
        """
        self.tasks = labels_of(config.labels)
        self.labels = [task.column for task in self.tasks]
        self.weight, self.group, self.time = config.weight, config.group, config.time
        rule = (config.time_unit, config.time_from, config.time_to, config.time_jump_days)
        self.times = None if config.time is None else TimeRule.of(config.time, *rule)
        features = [_resolved(feature) for feature in config.features]
        if not self.labels:
            raise SchemaError("schema.labels: found an empty list, expected at least one label column")
        if not features:
            raise SchemaError("schema.features: found none, expected at least one feature")
        _refuse_duplicates("features", [feature.name for feature in features])
        features = _kept(features, drop)
        self.numeric = [f for f in features if f.kind == "numeric" and not gives_ids(f)]
        self.categorical = [f for f in features if gives_ids(f)]
        self.number_sequences = [f for f in features if f.kind != "numeric" and not gives_ids(f)]
        self.sequences = _aligned(features)
        self.numeric_names: list[str] = []
        for feature in self.numeric:
            self.numeric_names += [feature.name] + [f"{feature.name}_missing"] * feature.indicator
        self.id_names = [f.name for f in self.categorical]
        self.pooled_names = [f.name for f in self.categorical if f.pooling != "none"]
        self.tables: dict[str, list[str]] = {}
        for feature in self.categorical:
            self.tables.setdefault(feature.table or feature.name, []).append(feature.name)
        self.pooling = {f.name: f.pooling for f in self.categorical}
        self.weighted = any(f.weights for f in self.categorical)
        of_numbers = [f.name for f in self.number_sequences]
        _refuse_duplicates("features", self.numeric_names + self.id_names + of_numbers)
        for feature in features:
            for column in (feature.column, feature.weights):
                if column in self.labels:
                    raise SchemaError(
                        f"schema.features: {feature.name!r} reads {column!r}, which is a label; "
                        "a model that sees its label learns nothing else"
                    )

    @classmethod
    def from_config(cls, config: Any) -> Schema:
        """Build a schema from a `SchemaConfig`, a mapping or an OmegaConf node. An unknown key is a SchemaError."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(config, SchemaConfig):
            return cls(config)
        plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
        _refuse_unknown_keys(plain)
        try:
            merged = OmegaConf.merge(OmegaConf.structured(SchemaConfig), plain)
            made = OmegaConf.to_object(merged)
            assert isinstance(made, SchemaConfig)
            return cls(made)
        except OmegaConfBaseException as error:
            where = error.full_key or "schema"
            raise SchemaError(f"schema key {where}: {str(error).splitlines()[0]}") from None


def gives_ids(feature: FeatureConfig) -> bool:
    """Return whether a feature gives ids, which have a table; others give numbers."""
    return feature.transform == "bucketise" or (feature.kind != "numeric" and feature.dtype != "float")


def _aligned(features: list[Feature]) -> dict[str, list[Feature]]:
    """Return the sequences with pooling none by group. Raises SchemaError: groups that do not hold together."""
    groups: dict[str, list[Feature]] = {}
    for feature in features:
        if feature.pooling == "none":
            groups.setdefault(feature.align or feature.name, []).append(feature)
    for name, group in groups.items():
        first = group[0]
        for other in group[1:]:
            if other.max_length != first.max_length:
                raise SchemaError(
                    f"schema.features: {other.name!r}: max_length {other.max_length}, expected {first.max_length} as "
                    f"{first.name!r}, with which it is aligned ({name!r})"
                )
        if not any(gives_ids(one) for one in group):
            raise SchemaError(
                f"schema.features: {first.name!r}: a sequence of numbers stands alone, expected one of ids with the "
                "same align, whose events it describes"
            )
    return groups


def _refuse_unknown_keys(plain: Any) -> None:
    _refuse_unknown(plain, SchemaConfig, "schema")
    features = plain.get("features") or []
    if not isinstance(features, (list, tuple)):
        raise SchemaError(f"schema.features: found {type(features).__name__}, expected a list")
    for i, feature in enumerate(features):
        if not isinstance(feature, FeatureConfig):
            _refuse_unknown(feature, FeatureConfig, f"schema.features[{i}]")
            if not feature.get("name"):
                raise SchemaError(f"schema.features[{i}]: name is missing")


def _refuse_unknown(mapping: Any, config: type, where: str) -> None:
    if not isinstance(mapping, dict):
        raise SchemaError(f"{where}: found {type(mapping).__name__}, expected keys and values")
    known = [f.name for f in fields(config)]
    for key in mapping:
        if key not in known:
            raise SchemaError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")


def _kept(features: list[Feature], drop: Sequence[str]) -> list[Feature]:
    """Return the features without those that are to be dropped. Raises SchemaError: unknown names, or none left."""
    names = [feature.name for feature in features]
    for name in drop:
        if name not in names:
            hint = nearest(name, names)
            if name.removesuffix("_missing") in names:
                hint = f"an indicator goes with its feature {name.removesuffix('_missing')!r}"
            raise SchemaError(f"data.drop: {name!r} is no feature of data.schema; {hint}")
    kept = [feature for feature in features if feature.name not in set(drop)]
    if not kept:
        raise SchemaError(f"data.drop names all {len(names)} features, expected at least one that is left")
    return kept


def _refuse_duplicates(where: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SchemaError(f"schema.{where}: {name!r} stands twice; names must differ")
        seen.add(name)


def _resolved(feature: FeatureConfig) -> Feature:
    """Return the feature with column, table and the signed form of missing_id filled in."""
    where = f"schema.features: {feature.name!r}"
    for key, known in (("kind", KINDS), ("dtype", DTYPES), ("pooling", POOLINGS), ("transform", TRANSFORMS)):
        value = getattr(feature, key)
        if value not in known:
            raise SchemaError(f"{where}: unknown {key} {value!r}; {nearest(str(value), known)}")
    if feature.kind == "numeric":
        _check_numeric(where, feature)
    elif feature.dtype == "float":
        _check_numbers(where, feature)
    else:
        _check_categorical(where, feature)
    if feature.table == "":
        raise SchemaError(f"{where}: table is empty, expected a name, or null for that of the feature")
    _check_pooling(where, feature)
    categorical = gives_ids(feature)
    missing_id = feature.missing_id
    if missing_id is not None:
        if not -(2**63) <= missing_id < 2**64:
            raise SchemaError(f"{where}: missing_id {missing_id} does not fit 64 bits")
        missing_id = missing_id - 2**64 if missing_id >= 2**63 else missing_id
    filled_in = {
        "column": feature.name if feature.column is None else feature.column,
        "table": (feature.table or feature.name) if categorical else None,
        "missing_id": missing_id,
        "boundaries": list(feature.boundaries),
    }
    return Feature(**(vars(feature) | filled_in))


def _refuse_set_keys(where: str, feature: FeatureConfig, keys: str, why: str) -> None:
    """Raise SchemaError if one of the keys differs from its default, because it would have no effect."""
    default = FeatureConfig()
    for key in keys.split():
        if getattr(feature, key) != getattr(default, key):
            raise SchemaError(f"{where}: {key} is set, but {why}")


def _check_numeric(where: str, feature: FeatureConfig) -> None:
    _refuse_set_keys(where, feature, "dtype delimiter weights max_length align", "a numeric feature has none")
    _check_transform(where, feature, "table missing_id pooling")


def _check_numbers(where: str, feature: FeatureConfig) -> None:
    """Check a sequence of numbers, bucketised ones among them."""
    if feature.kind != "sequence":
        raise SchemaError(f"{where}: dtype float, expected kind: sequence; kind is {feature.kind}")
    _refuse_set_keys(where, feature, "weights indicator delimiter", "a sequence of numbers has none")
    if feature.pooling != "none" and feature.transform != "bucketise":
        raise SchemaError(f"{where}: a sequence of numbers has pooling {feature.pooling}, expected pooling: none")
    _check_transform(where, feature, "table missing_id")


def _check_pooling(where: str, feature: FeatureConfig) -> None:
    if feature.pooling != "none":
        _refuse_set_keys(where, feature, "align", "only a sequence with pooling: none is aligned with others")
        return
    if feature.kind != "sequence":
        raise SchemaError(f"{where}: pooling none, expected mean or sum: only kind sequence is read event by event")
    if feature.max_length is None:
        raise SchemaError(f"{where}: pooling none and no max_length, expected the events that a model reads at most")


def _check_transform(where: str, feature: FeatureConfig, only_ids: str) -> None:
    """Check what is done to numbers. only_ids: keys that have no effect unless they are bucketised."""
    if feature.max_length is not None and feature.max_length < 1:
        raise SchemaError(f"{where}: max_length {feature.max_length}, expected at least 1")
    if feature.transform == "bucketise":
        why = "a bucketised null takes missing_id or an empty bag"
        _refuse_set_keys(where, feature, "indicator missing", why)
        rising = all(a < b for a, b in zip(feature.boundaries, feature.boundaries[1:], strict=False))
        if not feature.boundaries or not rising or not all(map(math.isfinite, feature.boundaries)):
            raise SchemaError(f"{where}: boundaries {feature.boundaries}, expected finite rising numbers")
    else:
        why = "only categorical features and bucketised ones have a table"
        _refuse_set_keys(where, feature, only_ids, why)
        _refuse_set_keys(where, feature, "boundaries", "only transform: bucketise reads it")
    if feature.transform != "standardise":
        _refuse_set_keys(where, feature, "mean std", "only transform: standardise reads it")
    if feature.transform != "min_max":
        _refuse_set_keys(where, feature, "min max", "only transform: min_max reads it")
    for key in ("missing", "mean", "std", "min", "max"):
        if not math.isfinite(getattr(feature, key)):
            raise SchemaError(f"{where}: {key} {getattr(feature, key)}, expected a finite number")
    if abs(feature.missing) > LARGEST:
        raise SchemaError(f"{where}: missing {feature.missing}, expected at most {LARGEST:.0e} either way")
    if feature.std <= 0:
        raise SchemaError(f"{where}: std {feature.std}, expected more than 0")
    if feature.min >= feature.max:
        raise SchemaError(f"{where}: min {feature.min} and max {feature.max}, expected min < max")


def _check_categorical(where: str, feature: FeatureConfig) -> None:
    why = f"a feature of kind {feature.kind} is not numeric"
    _refuse_set_keys(where, feature, "transform missing indicator mean std min max boundaries", why)
    if feature.kind != "ids":
        _refuse_set_keys(where, feature, "weights", f"only kind ids has weights; kind is {feature.kind}")
    if feature.kind == "id":
        _refuse_set_keys(where, feature, "delimiter max_length", "kind id is one id; use ids or sequence")
    if feature.delimiter == "":
        raise SchemaError(f"{where}: delimiter is empty, expected at least one character")
    if feature.delimiter is not None and feature.weights is not None:
        raise SchemaError(f"{where}: weights need a list column, but a delimiter is given")
    if feature.max_length is not None and feature.max_length < 1:
        raise SchemaError(f"{where}: max_length {feature.max_length}, expected at least 1")
