"""The best model of a finished run with its rows in another format, as a run folder of its own."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from omegaconf import OmegaConf

from ctr.config import Config, EmbeddingConfig, typed
from ctr.data.schema import Schema
from ctr.models.network import build_tables, build_tower
from ctr.train.score_run import run_config
from distributed.dynamic_tables import DynamicTables
from distributed.table_files import file_of, files_of, read_rows, rows_writer, to_arrow
from embedding.convert import ConversionError, convert_rows
from embedding.errors import ConfigError, TesseraError

KEYS = ("format", "formats", "rounding", "step", "range", "alpt")


def convert_run(run_dir: Path, output: Path, overrides: list[str]) -> dict[str, dict[str, ConversionError]]:
    """Write `output` as `run_dir` with embedding.<key>=<value> replaced. Returns the errors by table and group.

    The new folder appears when it is complete, and holds what scoring and further training need: config.yaml and best.

    Raises:
        ConfigError: no run there, an output that exists, or an override of another key than the format's.
        TesseraError: the saved model is not complete.
    """
    source = run_config(run_dir, [])
    target = _target(source, overrides)
    if output.exists():
        raise ConfigError(f"{output} exists already")
    if not (run_dir / "best" / ".metadata").exists():
        raise TesseraError(f"{run_dir / 'best'} holds no complete model; train the run first")
    schema = Schema(source.data.schema)
    before, after = (build_tables(one, schema, build_tower(one.model, schema)) for one in (source, target))
    if not isinstance(before, DynamicTables):
        raise ConfigError(f"{run_dir} has embedding.kind {source.embedding.kind}; only dynamic tables can be converted")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(run_dir / "best", partial / "best", ignore=shutil.ignore_patterns("rows"))
    errors: dict[str, dict[str, ConversionError]] = {}
    for old, new in zip(before.tables, after.tables, strict=True):
        found = errors.setdefault(old.name, {})
        files = files_of(run_dir / "best" / "rows", old.name)
        for rank, path in enumerate(files):
            with rows_writer(file_of(partial / "best" / "rows", new.name, rank, len(files)), new) as writer:
                for batch in read_rows(path, old):
                    writer.write_batch(to_arrow(convert_rows(batch, old, new, found), writer.schema))
    (partial / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(target), resolve=True))
    partial.rename(output)
    return errors


def _target(source: Config, overrides: list[str]) -> Config:
    known = [field.name for field in dataclasses.fields(EmbeddingConfig) if field.name in KEYS]
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith("embedding.") or key.split(".")[1] not in known or "=" not in override:
            expected = ", ".join(f"embedding.{name}" for name in known)
            raise ConfigError(f"override {override!r}: a conversion changes the format of rows; expected {expected}")
    return typed(OmegaConf.merge(OmegaConf.structured(source), OmegaConf.from_dotlist(overrides)))
