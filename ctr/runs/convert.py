"""The best model of a finished run with its rows in another format, as a run folder of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from tessera.ctr.config import Config, as_yaml, typed
from tessera.ctr.config_types import EmbeddingConfig
from tessera.ctr.data.config import schema_of
from tessera.ctr.network import build_tower
from tessera.ctr.output_folders import replacing
from tessera.ctr.renamed_keys import refuse_renamed
from tessera.ctr.runs.score import run_config
from tessera.ctr.runs.stored_config import targets_of
from tessera.ctr.table_overrides import split_off, with_overrides
from tessera.ctr.tables import build_tables
from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.rank import Process
from tessera.distributed.saved.dense import load_tensors, save_tensors
from tessera.distributed.saved.row_files import (
    ColumnSource,
    columns_of,
    copied,
    empty_columns,
    file_name,
    files_of,
    read_columns,
    to_batch,
    write_columns,
)
from tessera.distributed.saved.states import Saved, open_saved, save
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import decayed_in, describe_tables
from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.convert import ConversionError, convert_rows
from tessera.embedding.errors import ConfigError
from tessera.embedding.set_table import OwnedTable
from tessera.embedding.table import DynamicTable

KEYS = ("format", "formats", "rounding", "scale", "range", "alpt")
OF_TABLES = ("format", "rounding", "scale", "range")


def convert_run(
    run_dir: Path, output: Path, overrides: list[str], process: Process
) -> dict[str, dict[str, ConversionError]]:
    """Write `output` as `run_dir` with embedding.<key>=<value> replaced. Returns the errors by table and group.

    The new folder appears when it is complete, and holds what scoring and further training need: config.yaml and best.
    One table at a time is in memory. process: a job of one rank.

    Raises:
        ConfigError: no run there, an output that is not an earlier conversion, or an override of another key than the
            format's.
        CheckpointError: the saved model does not verify; what is wrong with it.
    """
    targets = [f"{key}={value}" for key, value in targets_of(overrides).items()]
    source = run_config(run_dir, targets)
    target = _target(source, [override for override in overrides if override not in targets])
    saved = open_saved(Storage(run_dir / "best"), process)
    schema = schema_of(source.data)
    before, after = (
        build_tables(one, schema, build_tower(one, schema), process.world_size) for one in (source, target)
    )
    if not isinstance(before, DynamicTables):
        raise ConfigError(f"{run_dir} has embedding.kind {source.embedding.kind}; only dynamic tables can be converted")
    assert isinstance(after, DynamicTables)  # the kind is no key of a conversion
    stored, made = before.tables, after.tables
    errors: dict[str, dict[str, ConversionError]] = {table.name: {} for table in stored}

    def write(storage: Storage) -> dict:
        save_tensors(storage, load_tensors(saved.folders[0], lambda name: True), process)
        for old, new in zip(stored, made, strict=True):
            rows = _converted(saved, old, new, errors[old.name], process)
            write_columns(storage, file_name("rows", new.name, 0, 1), rows, process.world_size)
        return {}

    def describe(*_: object) -> dict:
        tables: dict[str, OwnedTable] = {table.name: DynamicTable(table) for table in made}
        for name, table in tables.items():
            table.decayed = decayed_in(saved, name)
        return {"tables": describe_tables(tables)}

    with replacing(output, "OUTPUT", "convert_tables.py", [run_dir]) as folder:
        save(Storage(folder), "best", write, describe, process, step=saved.step, kind="model")
        (folder / "config.yaml").write_text(as_yaml(target))
    return errors


def _converted(
    saved: Saved, old: DynamicTableConfig, new: DynamicTableConfig, errors: dict[str, ConversionError], process: Process
) -> ColumnSource:
    """Return all rows of one table of a model, as `new` stores them; a model has no optimizer state."""
    like, parts = DynamicTable(old), []
    for path in files_of(saved.folders[0], "rows", old.name, process):
        for columns in read_columns(saved.folders[0], path, process.rank, process.world_size):
            batch = to_batch(columns, empty_columns(like), like, path, with_state=False, with_rows=False)
            converted = columns_of(convert_rows(batch, old, new, errors))
            parts.append({name: column for name, column in converted.items() if name not in ("state", "row")})
    if not parts:
        none = empty_columns(DynamicTable(new))
        parts.append({name: column for name, column in none.items() if name not in ("state", "row")})
    return copied({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _target(source: Config, overrides: list[str]) -> Config:
    known = [field.name for field in dataclasses.fields(EmbeddingConfig) if field.name in KEYS]
    overrides, of_tables = split_off(overrides)
    for one in of_tables:
        if one.key not in [(name,) for name in OF_TABLES]:
            where = f"embedding.tables.{one.table}"
            raise ConfigError(
                f"override {'.'.join([where, *one.key])}: a conversion changes the format of rows; expected "
                + ", ".join(f"{where}.{name}" for name in OF_TABLES)
            )
    for override in overrides:
        key = override.partition("=")[0]
        refuse_renamed(key)
        if not key.startswith("embedding.") or key.split(".")[1] not in known or "=" not in override:
            expected = ", ".join(f"embedding.{name}" for name in known)
            raise ConfigError(f"override {override!r}: a conversion changes the format of rows; expected {expected}")
    merged = OmegaConf.merge(OmegaConf.structured(source), OmegaConf.from_dotlist(overrides))
    assert isinstance(merged, DictConfig)
    if of_tables:
        merged.embedding.tables = with_overrides(source.embedding.tables or {}, of_tables)
    return typed(merged)
