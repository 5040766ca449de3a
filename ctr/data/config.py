"""Define the keys of conf/data: which files are read, and how. Their meaning is explained there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from tessera.ctr.data.day_folders import DayFolders, PartitionConfig, days_of
from tessera.ctr.data.schema import SchemaConfig
from tessera.distributed.locations import joined
from tessera.embedding.errors import ConfigError

SPLITS = ("train", "valid", "test")


@dataclass
class DataConfig:
    """conf/data/*.yaml. `path` is a folder or URI; `train`, `valid`, `test` lie below it (null: no such split)."""

    name: str = MISSING
    path: str = MISSING
    train: Any = "train"  # each split: a folder, file, pattern or URI, or a list of them
    valid: Any = "valid"
    test: Any = "test"
    days: Any = None  # a day, a range of days, or a list of both; or a mapping from splits to these
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    order: str = "mixed"
    period_days: float = 1.0
    lanes: int = 16
    window_rows: int = 32768
    threads: int = 1
    bad_rows: str = "raise"
    schema: SchemaConfig = field(default_factory=SchemaConfig)


def check_splits(data: DataConfig) -> None:
    """Raise ConfigError, naming the key, for paths and days that are malformed."""
    if isinstance(data.days, Mapping):
        unknown = sorted(set(data.days) - set(SPLITS))
        if unknown:
            raise ConfigError(f"data.days.{unknown[0]} is no split; expected {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
    for split in SPLITS:
        paths_of(data, split)
        split_days(data, split)


def paths_of(data: DataConfig, split: str) -> list[str] | None:
    """Return the paths and URIs of a split, relative ones below data.path; None if there is no such split.

    Raises ConfigError: something that is no path.
    """
    value = getattr(data, split)
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, (str, int, float)) and not isinstance(one, bool) for one in values):
        raise ConfigError(f"data.{split} is {value!r}; expected a folder, file, pattern or URI, or a list of them")
    return [_below(data.path, str(one)) for one in values]


def _below(root: str, path: str) -> str:
    if path in (".", "./"):
        return root
    return path if "://" in path or os.path.isabs(path) else joined(root, path)


def split_days(data: DataConfig, split: str) -> list[str] | None:
    """Return the keys of the days and hours of a split that are read; None means all.

    Raises ConfigError: something that is no day and no range of days.
    """
    folders = DayFolders.of(data.partition)
    days: Any = data.days
    if isinstance(days, Mapping):
        return days_of(days.get(split), f"data.days.{split}", folders)
    return days_of(days, "data.days", folders)
