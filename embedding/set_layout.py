"""What the tables of one set have in common, and what the random numbers of their rows depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tessera.embedding.config import DynamicTableConfig, key_of
from tessera.embedding.errors import ConfigError
from tessera.kernels.records import Keys, keys_of


def keys_of_set(tables: Sequence[DynamicTableConfig], device: torch.device | str) -> Keys:
    """Return what random numbers of the rows of tables depend on besides their ids."""
    of_tables = [
        [(table.key(group), key_of(f"{table.name}_{group.name}/rounding"), group.init_std) for group in table.groups]
        for table in tables
    ]
    return keys_of(tables[0].seed, of_tables, device)


def layout_key(table: DynamicTableConfig) -> tuple[object, ...]:
    """Return what tables of one set have in common."""
    kinds = [
        (group.name, group.dim, group.format, group.rounding, group.scale, group.learned) for group in table.groups
    ]
    optimizer = replace(table.optimizer, lr=1.0, decay=float(table.decay_floats > 0))
    return tuple(kinds), optimizer, table.seed


def check_alike(tables: Sequence[DynamicTableConfig]) -> None:
    """Raise ConfigError, one line, for tables that cannot be one set."""
    assert tables, "a set without tables"
    first, keys = tables[0], ("groups", "optimizer", "seed")
    expected = dict(zip(keys, layout_key(first), strict=True))
    for table in tables:
        for key, found in zip(keys, layout_key(table), strict=True):
            if found != expected[key]:
                of_first = f"that of table {first.name}, {expected[key]}"
                raise ConfigError(f"table {table.name}: {key} is {found}; expected {of_first}")
