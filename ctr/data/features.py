"""One feature: the keys that users write, what is filled in, and what contradicts itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tessera.ctr.data.errors import SchemaError, nearest
from tessera.ctr.data.expressions import Expression, parse
from tessera.ctr.data.labels import MISSING

KINDS = ("numeric", "vector", "id", "ids", "sequence", "cross")
DTYPES = ("int", "hex", "string", "float")
POOLINGS = ("mean", "sum", "none")
LONGEST_VECTOR = 65_536
LARGEST = 1e18  # of numbers that models read and of weights; the square of a larger one overflows float32
OF_NUMBERS = "transform mean std min max boundaries clip clip_quantiles fitted quantiles"  # keys that ids do not have
TRANSFORMS = ("none", "log1p", "log2_square", "log2_square_floor", "standardise", "min_max", "bucketise")


@dataclass
class FeatureConfig:
    """One feature. Two features may read one column, and two categorical features may share a table."""

    name: str = MISSING  # of the feature, in reports, in the plan and in the model
    # numeric | vector (a list of numbers) | id (one per row) | ids (any number per row) |
    # sequence (ordered, newest last) | cross (of two features)
    kind: str = "id"
    column: str | None = None  # default: the name
    # numeric and id: in the place of a column, what is computed of several, as log1p(price / quantity) or hour(time)
    expr: str | None = None
    # How ids are stored. int: integers of any width, the 64 bits are kept; hex: at most 16 hex digits;
    # string: XXH64 with seed 0 of the bytes; float: a sequence of numbers, such as prices or seconds since.
    dtype: str = "int"
    delimiter: str | None = None  # ids and sequence stored as one string: what stands between the items
    weights: str | None = None  # ids: a list column of as many weights
    # ids: the first so many are kept; sequence: the last so many; cross of bags: the first so many pairs
    max_length: int | None = None
    # mean | sum: of a bag's rows, for the model | none: a sequence reaches a model that reads sequences event by event
    pooling: str = "mean"
    length: int | None = None  # vector: how many numbers it has, in every row
    align: str | None = None  # pooling none: sequences of one name here have the same events; default: the name
    missing: float = 0.0  # numeric null: the value the model sees, after the transform; vector: each of its numbers
    # categorical null: this id; None gives an empty bag, and takes an event out of all aligned sequences
    missing_id: int | None = None
    indicator: bool = False  # numeric: one more numeric column <name>_missing, 1 where the value was null
    # none | log1p: sign(x) ln(1+|x|) | log2_square: ln(x)^2 where x > 2 (natural) | log2_square_floor: its whole part
    # where x > 2 | standardise: (x-mean)/std | min_max: (x-min)/(max-min)
    # | bucketise: the number of boundaries <= x, as a categorical id
    transform: str = "none"
    clip: list[float] = field(default_factory=list)  # numeric: [low, high], bounds of values, before transform
    clip_quantiles: list[float] = field(default_factory=list)  # clip at these, as [0.01, 0.99], of data.statistics
    # transform standardise, min_max: its two numbers are those of the column in data.statistics, after clip
    fitted: bool = False
    quantiles: int | None = None  # transform bucketise: into so many buckets of as many rows each, by data.statistics
    mean: float = 0.0  # transform standardise: subtracted from the value
    std: float = 1.0  # transform standardise: divides it then
    min: float = 0.0  # transform min_max: the value that becomes 0
    max: float = 1.0  # transform min_max: the value that becomes 1
    boundaries: list[float] = field(default_factory=list)  # transform bucketise: where buckets begin, rising
    of: list[str] = field(default_factory=list)  # cross: the two features, each pair of whose ids is an id
    symmetric: bool = False  # cross: a pair has one id in either order
    table: str | None = None  # embedding table; default: the name


@dataclass
class Feature(FeatureConfig):
    """One feature of a validated schema: `column` is filled in and, where the feature gives ids, `table`.

    A feature of an expression has it as `expression`, and its text as `column`, by which messages call it. A cross has
    the two features that it crosses as `members`, no column, and the kind of what it gives: `id` of two
    features with one id per row, else `ids`.
    """

    column: str = ""
    members: tuple[Feature, ...] = ()
    expression: Expression | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that the feature reads, each once."""
        if self.members:
            return list(dict.fromkeys(column for member in self.members for column in member.columns))
        if self.expression:
            return list(self.expression.columns)
        return [self.column] + ([self.weights] if self.weights else [])


def gives_ids(feature: FeatureConfig) -> bool:
    """Return whether a feature gives ids, which have a table; others give numbers."""
    of_numbers = feature.kind in ("numeric", "vector") or feature.dtype == "float"
    return feature.transform == "bucketise" or not of_numbers


def resolved(feature: FeatureConfig) -> Feature:
    """Return the feature with column, table and the signed form of missing_id filled in."""
    where = f"schema.features: {feature.name!r}"
    for key, known in (("kind", KINDS), ("dtype", DTYPES), ("pooling", POOLINGS), ("transform", TRANSFORMS)):
        value = getattr(feature, key)
        if value not in known:
            raise SchemaError(f"{where}: unknown {key} {value!r}; {nearest(str(value), known)}")
    if feature.kind != "cross":
        _refuse_set_keys(where, feature, "of symmetric", "only kind: cross reads it")
    if feature.kind == "numeric":
        _check_numeric(where, feature)
    elif feature.kind == "vector":
        _check_vector(where, feature)
    elif feature.dtype == "float":
        _check_numbers(where, feature)
    else:
        _check_categorical(where, feature)
    if feature.table == "":
        raise SchemaError(f"{where}: table is empty, expected a name, or null for that of the feature")
    _check_pooling(where, feature)
    expression = None if feature.expr is None else _expression_of(where, feature)
    categorical = gives_ids(feature)
    missing_id = feature.missing_id
    if missing_id is not None:
        if not -(2**63) <= missing_id < 2**64:
            raise SchemaError(f"{where}: missing_id {missing_id} does not fit 64 bits")
        missing_id = missing_id - 2**64 if missing_id >= 2**63 else missing_id
    filled_in = {
        "column": feature.expr or (feature.name if feature.column is None else feature.column),
        "expression": expression,
        "table": (feature.table or feature.name) if categorical else None,
        "missing_id": missing_id,
        "boundaries": list(feature.boundaries),
        "clip": list(feature.clip),
    }
    return Feature(**(vars(feature) | filled_in))


def _expression_of(where: str, feature: FeatureConfig) -> Expression:
    _refuse_set_keys(where, feature, "column", "expr is, too: columns are named in it")
    if feature.kind not in ("numeric", "id"):
        raise SchemaError(f"{where}: expr is set, but only kinds numeric and id read it; kind is {feature.kind}")
    return parse(feature.expr or "", f"{where}: expr")


def resolved_cross(feature: FeatureConfig, features: Mapping[str, Feature]) -> Feature:
    """Return a cross with its members and what follows from them filled in. features: all that are no cross, by name.

    Raises SchemaError: it crosses what is not there, or what cannot be crossed.
    """
    where = f"schema.features: {feature.name!r}"
    why = "a cross has the ids of the features that it crosses"
    others = "column expr dtype delimiter weights length align missing missing_id indicator"
    _refuse_set_keys(where, feature, f"{others} {OF_NUMBERS}", why)
    if len(feature.of) != 2:
        raise SchemaError(f"{where}: of is {feature.of}, expected the names of two features, as of: [user, item]")
    if feature.pooling not in ("mean", "sum"):
        raise SchemaError(f"{where}: unknown pooling {feature.pooling!r} of a cross, expected mean or sum")
    for name in feature.of:
        _check_member(where, name, features)
    if feature.of[0] == feature.of[1] and not feature.symmetric:
        raise SchemaError(f"{where}: of names {feature.of[0]!r} twice, expected two features (or symmetric: true)")
    members = tuple(features[name] for name in feature.of)
    kind = "ids" if any(member.kind in ("ids", "sequence") for member in members) else "id"
    if kind == "id" and feature.max_length is not None:
        raise SchemaError(f"{where}: max_length is set, but both features have one id per row, and so one pair")
    if kind == "ids" and feature.max_length is None:
        raise SchemaError(f"{where}: a cross of bags and no max_length, expected the pairs kept of a row at most")
    if feature.max_length is not None and feature.max_length < 1:
        raise SchemaError(f"{where}: max_length {feature.max_length}, expected at least 1")
    table = feature.name if feature.table is None else feature.table
    if not table:
        raise SchemaError(f"{where}: table is empty, expected a name, or null for that of the feature")
    # Its ids are random bits: where they are shown, they are shown so.
    filled_in = {"kind": kind, "column": "", "table": table, "members": members, "dtype": "hex", "of": list(feature.of)}
    return Feature(**(vars(feature) | filled_in))


def _check_member(where: str, name: str, features: Mapping[str, Feature]) -> None:
    if name not in features:
        known = [one.name for one in features.values() if gives_ids(one)]
        raise SchemaError(f"{where}: of names {name!r}, no feature that can be crossed; {nearest(name, known)}")
    member = features[name]
    if not gives_ids(member):
        raise SchemaError(f"{where}: of names {name!r}, which has no ids, expected one of them or transform: bucketise")
    if member.pooling == "none":
        raise SchemaError(f"{where}: of names {name!r}, whose events the model reads one by one, expected a pooled one")
    if member.weights:
        raise SchemaError(
            f"{where}: of names {name!r}, which has weights, and pairs have none; add a feature of its column without"
        )


def _refuse_set_keys(where: str, feature: FeatureConfig, keys: str, why: str) -> None:
    """Raise SchemaError if one of the keys differs from its default, because it would have no effect."""
    default = FeatureConfig()
    for key in keys.split():
        if getattr(feature, key) != getattr(default, key):
            raise SchemaError(f"{where}: {key} is set, but {why}")


def _check_numeric(where: str, feature: FeatureConfig) -> None:
    _refuse_set_keys(where, feature, "dtype delimiter weights max_length length align", "a numeric feature has none")
    _check_transform(where, feature, "table missing_id pooling")


def _check_vector(where: str, feature: FeatureConfig) -> None:
    none = "dtype delimiter weights max_length align table missing_id pooling"
    _refuse_set_keys(where, feature, none, "a vector has none")
    if feature.length is None or not 1 <= feature.length <= LONGEST_VECTOR:
        raise SchemaError(
            f"{where}: length is {feature.length}, expected how many numbers the vector has, 1 to {LONGEST_VECTOR:,}"
        )
    if feature.transform == "bucketise":
        raise SchemaError(f"{where}: transform bucketise makes ids of numbers, and a vector has none; expected another")
    _check_transform(where, feature, "table missing_id pooling")


def _check_numbers(where: str, feature: FeatureConfig) -> None:
    """Check a sequence of numbers, bucketised ones among them."""
    if feature.kind != "sequence":
        raise SchemaError(f"{where}: dtype float, expected kind: sequence; kind is {feature.kind}")
    _refuse_set_keys(where, feature, "weights indicator delimiter length", "a sequence of numbers has none")
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
    for key in ("fitted", "quantiles", "clip_quantiles"):
        if getattr(feature, key):
            raise SchemaError(f"{where}: {key} is set, but data.statistics, which has its numbers, was not read")
    low_high = feature.clip
    if low_high and (len(low_high) != 2 or not all(map(math.isfinite, low_high)) or low_high[0] >= low_high[1]):
        raise SchemaError(f"{where}: clip {low_high}, expected two finite rising numbers, as [0, 100]")
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
    _refuse_set_keys(where, feature, f"missing indicator length {OF_NUMBERS}", why)
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
