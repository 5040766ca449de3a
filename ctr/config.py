"""The configuration of a job: hydra composes `conf/` with the command line, `config_types.py` gives it types."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tessera.ctr.config_checks import check
from tessera.ctr.config_help import choices_and_keys
from tessera.ctr.config_types import Config, ParameterGroup
from tessera.ctr.data.fitted import fill_fitted
from tessera.ctr.data.schema import FeatureConfig
from tessera.ctr.overrides import compose_overrides, keys_of
from tessera.ctr.renamed_keys import refuse_all_renamed
from tessera.ctr.table_settings import fill_row_optimizer, typed_tables
from tessera.embedding.errors import ConfigError, did_you_mean

#: Other names of keys on the command line. `from` cannot be the name of an attribute.
ALIASES = {"daily.from=": "daily.first=", "daily.to=": "daily.last="}


def load_config(arguments: Sequence[str], description: str) -> Config:
    """Compose the configuration from command line arguments: hydra overrides, `--config-dir`, `--cfg`.

    Raises:
        ConfigError: an unknown key or group (with the nearest known one), or a value of the wrong type.
        SystemExit: after `--help` or `--cfg`, which only print.
    """
    return config_of(config_parser(description).parse_intermixed_args(arguments))


def config_of(options: argparse.Namespace) -> Config:
    """Compose the configuration from what `config_parser`, or one with more options, has parsed; as `load_config`."""
    for folder in options.config_dir:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir {folder} is not a folder")
    for alias, key in ALIASES.items():
        options.overrides = [
            key + one.removeprefix(alias) if one.startswith(alias) else one for one in options.overrides
        ]
    composed = compose_overrides(options.overrides, [Path(folder).resolve() for folder in options.config_dir], Config)
    config = typed(composed)
    if options.cfg:
        print(as_yaml(config))
        raise SystemExit(0)
    return config


def as_yaml(config: Config) -> str:
    """Return all keys and values as they stand in the `config.yaml` of a run.

    As `OmegaConf.to_yaml`, which checks types again and so takes ten times as long.
    """
    text: str = yaml.dump(asdict(config), Dumper=_Dumper, allow_unicode=True, sort_keys=False)
    return text


_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_SafeDumper):
    """Puts quotes around text that OmegaConf or YAML 1.1 would read as something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if _reads_as_other(text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _reads_as_other(text: str) -> bool:
    try:
        float(text)  # 1e3 and 1_000, too
    except ValueError:
        return text in ("y", "Y", "n", "N")  # what else YAML itself reads as no text, its library sees
    return True


def config_parser(description: str) -> argparse.ArgumentParser:
    """The command line of what trains. `--help` lists the choices of each group of conf/ and all keys."""
    parser = ConfigParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="model=deepfm data.path=/data trainer.epochs=2; all are below")
    parser.add_argument(
        "--config-dir", action="append", default=[], help="a folder of your own yaml, laid out as conf/"
    )
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and leave")
    return parser


class ConfigParser(argparse.ArgumentParser):
    """Composes what it lists only when somebody asks for help."""

    def format_help(self) -> str:
        return f"{super().format_help()}\n{choices_and_keys(Config)}"


def typed(composed: DictConfig) -> Config:
    """Give a composed configuration its types and check values that no dataclass can.

    Raises:
        ConfigError: naming the key, what was found and what is expected.
        SchemaError: data.statistics has not what a feature wants of it.
    """
    try:
        refuse_all_renamed(composed)
        config = OmegaConf.to_object(OmegaConf.unsafe_merge(deepcopy(_schema()), composed))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_type(error, composed)) from None
    assert isinstance(config, Config)
    fill_fitted(config.data)
    fill_row_optimizer(config, given=OmegaConf.select(composed, "optimizer.sparse") or {})
    config.embedding.tables = typed_tables(config.embedding.tables)
    check(config)
    return config


@cache
def _schema() -> DictConfig:
    """Return all keys with their types and defaults. Made once: reading the dataclasses takes six times a copy."""
    schema = OmegaConf.structured(Config)
    assert isinstance(schema, DictConfig)
    return schema


def _explain_type(error: OmegaConfBaseException, composed: DictConfig) -> str:
    first_line = str(error).splitlines()[0]
    key = error.full_key or ""
    unknown = re.match(r"Key '(\w+)' not in '(\w+)'", first_line)
    if unknown:
        dataclass_type = next((t for t in _dataclasses() if t.__name__ == unknown[2]), None)
        names = [field.name for field in fields(dataclass_type)] if dataclass_type else []
        return f"unknown key {key!r}" + did_you_mean(unknown[1], names, f"known: {', '.join(names)}")
    if "Missing mandatory value" in first_line:
        return f"{key} is not set"
    if "is not a ListConfig" in first_line:
        return f'{key}: expected a list, written "{key}=[a,b]"'
    return f"{key}: {first_line}"


def _dataclasses() -> Iterable[type]:
    return [
        FeatureConfig,
        ParameterGroup,
        *(kind for _, kind in keys_of(Config) if isinstance(kind, type) and is_dataclass(kind)),
    ]
