"""Make the gates that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping

from tessera.ctr.data.schema import Schema
from tessera.ctr.models.tower import Fields
from tessera.ctr.selection.autofield import AutoField
from tessera.ctr.selection.config import SelectionConfig
from tessera.ctr.selection.dim_masks import DimMasks
from tessera.ctr.selection.field_groups import field_groups
from tessera.ctr.selection.gates import LPFS, ConcreteDropout, FieldGates
from tessera.ctr.selection.optfs import OptFS


def make_gates(config: SelectionConfig, schema: Schema, fields: Fields, dims: Mapping[str, int]) -> FieldGates | None:
    """Return the gates that the configuration asks for. dims: of the tower's groups of embeddings.

    Raises ConfigError: fields or tables that they cannot gate.
    """
    groups = field_groups(schema)
    if config.method == "dropout":
        return ConcreteDropout(groups, config.penalty, config.temperature)
    if config.method == "lpfs":
        return LPFS(groups, config.threshold, config.eps, config.eps_decay)
    if config.method == "autofield":
        return AutoField(groups, config.lr, config.cooling)
    if config.method == "optfs":
        return OptFS(groups, fields, config.l1, config.sharpest, config.sharpening_steps)
    if config.method == "dnis":
        return DimMasks(schema.tables, fields, dims, config.block, config.lr, config.pull)
    return None
