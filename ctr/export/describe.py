"""Say what a model reads, and write what its tables hold, as an export has it (`ctr/serving/description.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from urllib.parse import quote

import numpy as np

from tessera.ctr.config import Config
from tessera.ctr.data.schema import FeatureConfig, Schema
from tessera.ctr.serving.conversion import Conversion, Note, chosen_format
from tessera.ctr.serving.description import Description, StoredGroup, StoredLabel, StoredProjection, StoredTable
from tessera.ctr.serving.files import SealedWriter
from tessera.ctr.serving.saved_models import SavedModel
from tessera.ctr.serving.table_writer import folder_of, groups_of, write_array, write_header
from tessera.ctr.tables import BAGS
from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.static_tables import StaticTables
from tessera.distributed.tables import Tables

OOV = "dense/oov.npy"
Groups = tuple[tuple[str, int, str], ...]  # name, dim, format


@dataclass(frozen=True)
class TablePlan:
    """A table that is to be exported. stored: its groups as training has them; groups: as the export will; rows: of a
    static table, None where rows come by id."""

    name: str
    features: tuple[str, ...]
    stored: Groups
    groups: tuple[StoredGroup, ...]
    rows: int | None


def plans_of(tables: Tables, schema: Schema, dims: Mapping[str, int], format: str | None) -> list[TablePlan]:
    """Return the tables of a model as an export has them.

    dims: group -> dim, as the tower wants. format: of rows that become smaller by it; None: as they are stored.
    """
    if isinstance(tables, DynamicTables):
        return [
            _plan(table.name, table.features, tuple((g.name, g.dim, g.format) for g in table.groups), format, None)
            for table in tables.tables
        ]
    if not isinstance(tables, StaticTables):
        return []
    stored = tuple((group, dim, "fp32") for group, dim in dims.items())
    return [_plan(name, tuple(features), stored, format, tables.rows) for name, features in schema.tables.items()]


def _plan(name: str, features: tuple[str, ...], stored: Groups, format: str | None, rows: int | None) -> TablePlan:
    chosen = [(group, dim, chosen_format(kept, format, dim)) for group, dim, kept in stored]
    return TablePlan(name, features, stored, groups_of(name, chosen), rows)


def describe(
    config: Config,
    schema: Schema,
    dims: Mapping[str, int],
    tables: list[StoredTable],
    dense: tuple[bool, list[StoredProjection]],
) -> Description:
    """Return what `features.json` says. dense: as `write_dense` returns it."""
    features = [FeatureConfig(**asdict(feature)) for feature in config.data.schema.features]
    averaged = [one.name for one in schema.categorical if one.kind in BAGS and one.pooling == "mean"]
    has_oov, projections = dense
    return Description(
        [StoredLabel(task.name, task.is_number) for task in schema.tasks],
        features,
        dict(dims),
        averaged,
        tables,
        OOV if has_oov else None,
        projections,
    )


def write_dense(writer: SealedWriter, model: SavedModel, plans: list[TablePlan]) -> tuple[bool, list[StoredProjection]]:
    """Write what tables have besides rows. Returns whether ids without a row have one to read, and the projections."""
    found = model.tensors("tables/others") | model.tensors("tables/projections.")
    projections = []
    named = {f"{plan.name}_{group.name}": (plan.name, group.name) for plan in plans for group in plan.groups}
    for name, values in sorted(found.items()):
        if name == "tables/others":
            write_array(writer, OOV, values.float().numpy())
            continue
        stem = name.removeprefix("tables/projections.").removesuffix(".weight")
        path = f"dense/projection.{quote(stem, safe='')}.npy"
        projections.append(StoredProjection(*named[stem], path))
        write_array(writer, path, values.float().numpy())
    return "tables/others" in found, projections


def write_static(writer: SealedWriter, plan: TablePlan, model: SavedModel, note: Note | None) -> StoredTable:
    """Write a table whose rows are all there, piece by piece."""
    assert plan.rows is not None
    for number, group in enumerate(plan.groups):
        conversion = Conversion([plan.stored[number]], [group], note)
        name = f"tables/embedding_bags.{plan.name}_{group.name}.weight"
        pieces = sorted(model.pieces(name), key=lambda piece: piece[1])
        columns = [conversion.floats(values[:, : group.dim].float().contiguous(), group) for *_, values in pieces]
        for place, path in enumerate([group.values, *([group.scales] if group.scales else [])]):
            parts = [one[place] for one in columns]
            with writer.open(path) as stream:
                write_header(stream, parts[0].dtype, (plan.rows, *parts[0].shape[1:]))
                for part in parts:
                    stream.write(np.ascontiguousarray(part))
    return StoredTable(plan.name, plan.features, "static", folder_of(plan.name), plan.rows, 0, plan.groups)
