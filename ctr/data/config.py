"""Define the keys of `data`: which files are read, and how."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from tessera.ctr.data.day_folders import DayFolders, PartitionConfig, days_of
from tessera.ctr.data.schema import Schema, SchemaConfig
from tessera.distributed.locations import joined
from tessera.embedding.errors import ConfigError
from tessera.embedding.settings import section, setting

SPLITS = ("train", "valid", "test")


@dataclass
class DataConfig:
    """Which files are read and how (docs/data.md). A split is a folder, file, pattern or URI, or a list of them."""

    name: str = setting(MISSING, "for run folders and reports")
    path: str = setting(MISSING, "root of the data set: a folder or a URI such as s3://bucket/criteo")
    train: Any = setting(
        "train", "training rows: a folder, file or pattern (*) below path, a URI, or a list of these; null: none"
    )
    valid: Any = setting("valid", "rows for evaluation during training, early stopping and keeping the best")
    test: Any = setting("test", "rows for the report at the end")
    days: Any = setting(
        None,
        "of folders of days only these: [2026-01-01, 2026-01-03..2026-01-09], or for each split {train: [..], "
        "test: [..]}",
    )
    partition: PartitionConfig = section(PartitionConfig, "how the folders of days are called")
    order: str = setting(
        "mixed", "of training rows: mixed: those of all days at once | time: day after day, shuffled within each"
    )
    period_days: float = setting(1.0, "with order: time, how many days are shuffled together")
    lanes: int = setting(
        16, "canonical lanes: the order of rows is the same for every number of ranks up to this one", at_least=1
    )
    window_rows: int = setting(
        32768, "rows shuffled together inside a lane; memory is about lanes x 2 windows", at_least=1
    )
    threads: int = setting(1, "decoding threads per rank", at_least=1)
    bad_rows: str = setting("raise", "raise: stop at a row that breaks the contract; skip: leave it out and count it")
    where: str | None = setting(
        None, "only rows of which this is true, in all splits: views > 0 and country != 'de'; null: all rows"
    )
    negative_rate: float = setting(
        1.0,
        "share of the training rows with label 0 that are read; the loss is corrected, so predictions are of all rows",
        above=0,
    )
    statistics: str | None = setting(
        None,
        "statistics.json of tessera prepare stats, from which fitted, quantiles and clip_quantiles are filled in",
    )
    drop: list[str] = setting([], "features of schema that are left out, as if they did not stand there")
    schema: SchemaConfig = section(SchemaConfig, "the columns of the data set")


def schema_of(data: DataConfig) -> Schema:
    """Return the schema of a data set without the features that `data.drop` names. Raises SchemaError."""
    return Schema(data.schema, data.drop)


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
