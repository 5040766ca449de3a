"""Describe the columns of a data set: labels, numeric features and categorical features.

`SchemaConfig` is the form users write in `conf/data/*.yaml`; `Schema` is the same after the defaults are
filled in and the contradictions are refused. Nothing here opens a file: `tessera.ctr.data.files` compares the footers
with the schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.features import LARGEST, Feature, FeatureConfig, gives_ids, nearest, resolved, resolved_cross
from tessera.ctr.data.labels import labels_of
from tessera.ctr.data.times import TimeRule
from tessera.embedding.settings import setting

__all__ = ["LARGEST", "Feature", "FeatureConfig", "Schema", "SchemaConfig", "gives_ids", "nearest"]


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


class Schema:
    """A validated schema.

    Attributes:
        tasks: the labels, in order (`labels.py`); labels: the columns that hold them
        weight, group, time: column names, None where absent
        times: what is known of the column of times, and which ones are plausible; None without one
        stored: the features that are read from columns, in order: all but crosses
        crosses: the crosses, in order; they are among the categorical ones
        only_crossed: features that are dropped, but for the crosses that they are in
        numeric: the numeric features in order, without bucketised ones
        vectors: the vector features in order
        categorical: the features that give ids, in order, bucketised numerics among them
        sequences: group -> its aligned sequences with pooling none, in order; cut to the same length
        number_sequences: those of them that are numbers, keys of `Batch.numbers`, in order
        pooled_names: keys of `Batch.ids` whose rows are pooled, in order
        scalar_names: columns of `Batch.numeric` that are one number: an indicator follows its feature, those of vectors
            come last
        numeric_names: all columns of `Batch.numeric`: the numbers of vectors, name[0], name[1], .., behind the others
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
        features = _with_crosses(config.features)
        if not self.labels:
            raise SchemaError("schema.labels: found an empty list, expected at least one label column")
        if not features:
            raise SchemaError("schema.features: found none, expected at least one feature")
        _refuse_duplicates("features", [feature.name for feature in features])
        features = _kept(features, drop)
        self.crosses = [f for f in features if f.members]
        names = {f.name for f in features}
        members = {member.name: member for cross in self.crosses for member in cross.members}
        self.only_crossed = [member for member in members.values() if member.name not in names]
        self.numeric = [f for f in features if f.kind == "numeric" and not gives_ids(f)]
        self.categorical = [f for f in features if gives_ids(f)]
        self.vectors = [f for f in features if f.kind == "vector"]
        self.number_sequences = [f for f in features if f.kind == "sequence" and not gives_ids(f)]
        self.sequences = _aligned(features)
        self.scalar_names: list[str] = []
        for feature in [*self.numeric, *self.vectors]:
            own = [feature.name] * (feature.kind != "vector")
            self.scalar_names += own + [f"{feature.name}_missing"] * feature.indicator
        self.numeric_names = [
            *self.scalar_names,
            *(f"{f.name}[{i}]" for f in self.vectors for i in range(length_of(f))),
        ]
        self.id_names = [f.name for f in self.categorical]
        self.pooled_names = [f.name for f in self.categorical if f.pooling != "none"]
        self.tables: dict[str, list[str]] = {}
        for feature in self.categorical:
            self.tables.setdefault(feature.table or feature.name, []).append(feature.name)
        self.pooling = {f.name: f.pooling for f in self.categorical}
        self.weighted = any(f.weights for f in self.categorical)
        of_numbers = [f.name for f in self.number_sequences]
        of_numbers += [f.name for f in self.vectors]
        _refuse_duplicates("features", self.numeric_names + self.id_names + of_numbers)
        self.stored = [f for f in features if not f.members] + self.only_crossed
        for feature in self.stored:
            for column in feature.columns:
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


def length_of(feature: Feature) -> int:
    """Return how many numbers a vector has."""
    assert feature.length is not None  # `resolved` refuses vectors without
    return feature.length


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


def _with_crosses(configs: Sequence[FeatureConfig]) -> list[Feature]:
    """Return features with all filled in, in their order."""
    plain = {one.name: resolved(one) for one in configs if one.kind != "cross"}
    if len(plain) + sum(one.kind == "cross" for one in configs) != len(configs):
        _refuse_duplicates("features", [one.name for one in configs])
    return [plain[one.name] if one.kind != "cross" else resolved_cross(one, plain) for one in configs]


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
