"""The whole model: sharded tables below, the tower on top."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from ctr.data.batch import Batch
from ctr.data.schema import Schema
from ctr.models.tower import Fields, Tower
from distributed.static_tables import StaticTables
from embedding.config import TableConfig
from embedding.errors import ConfigError


class Network(nn.Module):
    """Tables -> tower -> logit. With `amp` the tower runs in bfloat16; tables and logits stay float32."""

    def __init__(self, tables: StaticTables, tower: Tower, id_names: Sequence[str], amp: bool) -> None:
        super().__init__()
        self.tables = tables
        self.tower = tower
        self.id_names = tuple(id_names)
        self.amp = amp

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns logits [B] float32 and the looked-up embeddings, group -> [B, id fields, dim] float32."""
        embeddings = self.tables(batch.ids)
        with torch.autocast(batch.numeric.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.tower(batch.numeric, embeddings)
        return logits.float(), embeddings


def build_tower(model: dict, schema: Schema) -> Tower:
    """Instantiate the class that `model.target` names ("ctr.models.deepfm.DeepFM") with the other keys as arguments.

    Raises:
        ConfigError: no such class, or a key that its constructor does not take, or one that it misses.
    """
    arguments = dict(model)
    target = arguments.pop("target")
    module_name, _, class_name = target.rpartition(".")
    try:
        tower_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.target is {target!r}, which cannot be imported: {error}") from None
    known = [name for name in inspect.signature(tower_class).parameters if name != "fields"]
    for name in arguments:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean model.{near[0]}?" if near else f"; expected {', '.join(known)}"
            raise ConfigError(f"model.{name} is not a key of {class_name}{hint}")
    missing = [name for name in known if name not in arguments]
    if missing:
        raise ConfigError(f"model.{missing[0]} is missing; {class_name} needs {', '.join(known)}")
    return tower_class(Fields(tuple(schema.numeric_names), tuple(schema.id_names)), **arguments)


def table_configs(schema: Schema, tower: Tower, init_std: float) -> dict[str, list[TableConfig]]:
    """For each group of embeddings the tower wants, one table per table name of the schema."""
    return {
        group: [
            TableConfig(f"{table}_{group}", dim, tuple(features), init_std) for table, features in schema.tables.items()
        ]
        for group, dim in tower.embedding_dims.items()
    }
