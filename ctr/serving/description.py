"""`features.json` of an export: what the model reads, and where the rows of its tables are.

labels, features        the schema of training, key for key (docs/data.md)
groups                  embeddings that the tower wants of each id: name -> dim
averaged                features whose bags are averaged; others are summed
tables                  name, features, kind (dynamic: rows by id; static: a fixed number of rows), folder, rows,
                        bits (of the hash index), and of each group its name, dim, format, values, scales (files);
                        where rows decay, decay_floats and decayed (`decay.py`)
oov                     file of the rows [tables, width] that ids without a row read; null: zeros
projections             matrices of tables whose rows are narrower than the tower wants: table, group, file
hidden                  width of what the graph answers beside logits, the input of its last layer; null: nothing
drop                    features that only crosses read
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tessera.ctr.data.schema import FeatureConfig, Schema, SchemaConfig
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import Place
from tessera.kernels.formats import FORMATS

FEATURES = "features.json"
TOWER = "tower.pt2"
WEIGHTS = "weights.safetensors"  # of versions: they take the place of the graph's
FORMAT = 1  # of exports


@dataclass(frozen=True)
class StoredGroup:
    """One group of a table's rows. format: as `kernels/formats.py` has it; values, scales: .npy files of the export."""

    name: str
    dim: int
    format: str
    values: str
    scales: str | None = None


@dataclass(frozen=True)
class StoredTable:
    """A table. rows: its number of rows; bits: of the hash index (dynamic). decay_floats: numbers
    that rows note of their decay, 0 where they do not decay; decayed: what these are compared with."""

    name: str
    features: tuple[str, ...]
    kind: str
    folder: str
    rows: int
    bits: int
    groups: tuple[StoredGroup, ...]
    decay_floats: int = 0
    decayed: float = 0.0


@dataclass(frozen=True)
class StoredProjection:
    """The matrix float32 [rows' dim, tower's dim] of one group of a table."""

    table: str
    group: str
    file: str


@dataclass(frozen=True)
class StoredLabel:
    """A label. is_number: the model answers any number, as it is; else a probability."""

    name: str
    is_number: bool = False


@dataclass(frozen=True)
class Description:
    """What `features.json` says."""

    labels: list[StoredLabel]
    features: list[FeatureConfig]
    groups: dict[str, int]
    averaged: list[str]
    tables: list[StoredTable]
    oov: str | None = None
    projections: list[StoredProjection] = field(default_factory=list)
    hidden: int | None = None
    drop: list[str] = field(default_factory=list)

    def schema(self) -> Schema:
        """Return the schema that decodes rows, as the reader of training has it."""
        labels = [label.name for label in self.labels]
        return Schema(SchemaConfig(labels=labels, features=list(self.features)), self.drop)

    def to_json(self) -> dict[str, Any]:
        said = asdict(self)
        for table in said["tables"]:
            if not table["decay_floats"]:
                del table["decay_floats"], table["decayed"]
        return said


def read_description(place: Place) -> Description:
    """Return the description of an export. Raises ExportError: it is not what this version writes."""
    found = place.read_json(FEATURES)
    try:
        tables = [_table(one) for one in found["tables"]]
        described = Description(
            labels=[StoredLabel(**label) for label in found["labels"]],
            features=[FeatureConfig(**_known(FeatureConfig, one)) for one in found["features"]],
            groups={str(name): int(dim) for name, dim in found["groups"].items()},
            averaged=[str(name) for name in found["averaged"]],
            tables=tables,
            oov=found["oov"],
            projections=[StoredProjection(**one) for one in found["projections"]],
            hidden=None if found.get("hidden") is None else int(found["hidden"]),
            drop=[str(name) for name in found.get("drop", [])],  # exports of earlier versions have none
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{place.name}/{FEATURES} is not what this version writes: {error!r}") from None
    if any(group.format not in FORMATS for table in tables for group in table.groups):
        raise ExportError(f"{place.name}/{FEATURES}: expected formats {', '.join(FORMATS)}")
    return described


def _known(kind: type, one: dict[str, Any]) -> dict[str, Any]:
    names = {known.name for known in fields(kind)}
    unknown = one.keys() - names
    if unknown:
        raise ValueError(f"unknown key {min(unknown)}")
    return one


def _table(one: dict[str, Any]) -> StoredTable:
    groups = tuple(StoredGroup(**group) for group in one["groups"])
    return StoredTable(**{**one, "features": tuple(one["features"]), "groups": groups})
