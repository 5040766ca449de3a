"""Make the gates that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.ctr.models.tower import Fields
from tessera.ctr.selection.autofield import AutoField
from tessera.ctr.selection.config import SelectionConfig
from tessera.ctr.selection.field_groups import FieldGroup
from tessera.ctr.selection.gates import LPFS, ConcreteDropout, FieldGates
from tessera.ctr.selection.optfs import OptFS


def make_gates(config: SelectionConfig, groups: Sequence[FieldGroup], fields: Fields) -> FieldGates | None:
    """Return the gates that the configuration asks for. Raises ConfigError: fields that they cannot gate."""
    if config.method == "dropout":
        return ConcreteDropout(groups, config.penalty, config.temperature)
    if config.method == "lpfs":
        return LPFS(groups, config.threshold, config.eps, config.eps_decay)
    if config.method == "autofield":
        return AutoField(groups, config.lr, config.cooling)
    if config.method == "optfs":
        return OptFS(groups, fields, config.l1, config.sharpest, config.sharpening_steps)
    return None
