"""Say what a model reads and which tables it has, as an export does (`ctr/serving/description.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from tessera.ctr.config import Config
from tessera.ctr.data.schema import FeatureConfig, Schema
from tessera.ctr.serving.conversion import chosen_format
from tessera.ctr.serving.description import Description, StoredLabel, StoredProjection, StoredTable
from tessera.ctr.serving.model_files import OOV, Groups, TablePlan
from tessera.ctr.serving.table_writer import groups_of
from tessera.ctr.tables import BAGS
from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.static_tables import StaticTables
from tessera.distributed.tables import Tables


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
    hidden = [one.name for one in schema.only_crossed]
    dropped = set(config.data.drop) - set(hidden)
    features = [FeatureConfig(**asdict(one)) for one in config.data.schema.features if one.name not in dropped]
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
        drop=hidden,
    )
