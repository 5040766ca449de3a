"""The configuration of a job: hydra composes `conf/` with the command line, the dataclasses below give it types."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tessera.ctr.config_checks import check
from tessera.ctr.config_help import choices_and_keys
from tessera.ctr.daily.config import DailyConfig
from tessera.ctr.data.config import DataConfig
from tessera.ctr.overrides import compose_overrides
from tessera.ctr.train.distil import DistilConfig
from tessera.embedding.errors import ConfigError, did_you_mean


@dataclass
class AdmissionConfig:
    kind: str = "none"
    threshold: int = 1
    capacity: int = 1 << 20
    splits: int = 7


@dataclass
class AlptConfig:
    every: int | None = None
    lr: float = 2e-5
    weight_decay: float = 0.0
    gradient_scale: str = "batch"


@dataclass
class EmbeddingConfig:
    """conf/embedding/*.yaml."""

    kind: str = MISSING
    rows: int = MISSING
    init_std: float = MISSING
    l2: float = 0.0
    others: str = "zeros"
    first_values: str = "random"
    bag_path: str = "never"
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    ttl_days: float | None = None
    clock: str = "event"
    expire_every: int = 50
    max_rows: int | None = None
    max_bytes: int | None = None
    cache_rows: int | None = None
    cache_bytes: int | None = None
    eviction: str = "raise"
    format: str = "fp32"
    formats: dict[str, str] | None = None
    rounding: str = "stochastic"
    step: float | None = None
    range: float = 0.3
    alpt: AlptConfig = field(default_factory=AlptConfig)
    transport: str = "fp32"


@dataclass
class SideConfig:
    """What both optimizers have: that of the dense tower and that of the tables."""

    name: str = MISSING
    lr: float = MISSING
    eps: float = MISSING
    weight_decay: float = 0.0
    warmup_steps: int = 0


@dataclass
class DenseConfig(SideConfig):
    clip_norm: float | None = None


@dataclass
class SparseConfig(SideConfig):
    beta1: float = 0.9
    beta2: float = 0.999
    initial_accumulator: float = 0.0
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    state_format: str = "fp32"
    old_rows_factor: float = 1.0


@dataclass
class PlateauConfig:
    factor: float | None = None
    patience: int = 1
    floor: float = 1.0e-6


@dataclass
class OptimizerConfig:
    """conf/optimizer/*.yaml."""

    dense: DenseConfig = field(default_factory=DenseConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    plateau: PlateauConfig = field(default_factory=PlateauConfig)


@dataclass
class EarlyStopConfig:
    metric: str = "auc"
    patience: int | None = None


@dataclass
class CheckpointConfig:
    folder: str | None = None
    every: int | None = None
    keep: int = MISSING
    overlap: bool = MISSING
    full_every: int = MISSING


@dataclass
class WarmStartConfig:
    path: str | None = None
    rename: list[str] = field(default_factory=list)
    optimizer: bool = True


@dataclass
class ReplayConfig:
    path: str | None = None
    weight: float = 1.0


@dataclass
class TrainerConfig:
    """conf/trainer/*.yaml. `batch_size` is the global one, over all ranks."""

    run_dir: str | None = None
    seed: int = MISSING
    batch_size: int = MISSING
    epochs: int = MISSING
    max_steps: int | None = None
    shuffle: bool = True
    device: str = "auto"
    threads: int | None = None
    amp: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    log_every: int = MISSING
    eval_every: int | None = None
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    resume: str | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    timeout_seconds: float = MISSING


@dataclass
class Config:
    """Everything a run depends on; saved resolved as `config.yaml` in the run folder."""

    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    numeric: dict[str, Any] = field(default_factory=dict)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    daily: DailyConfig = field(default_factory=DailyConfig)


#: Other names of keys on the command line. `from` cannot be the name of an attribute.
ALIASES = {"daily.from=": "daily.first=", "daily.to=": "daily.last="}


def load_config(arguments: Sequence[str], description: str) -> Config:
    """Compose the configuration from command line arguments: hydra overrides, `--config-dir`, `--cfg`.

    Raises:
        ConfigError: an unknown key or group (with the nearest known one), or a value of the wrong type.
        SystemExit: after `--help` or `--cfg`, which only print.
    """
    options = config_parser(description).parse_intermixed_args(arguments)
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
        print(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
        raise SystemExit(0)
    return config


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
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_type(error, composed)) from None
    assert isinstance(config, Config)
    check(config)
    return config


def _explain_type(error: OmegaConfBaseException, composed: DictConfig) -> str:
    first_line = str(error).splitlines()[0]
    key = error.full_key or ""
    unknown = re.match(r"Key '(\w+)' not in '(\w+)'", first_line)
    if unknown:
        dataclass_type = next((t for t in _dataclasses() if t.__name__ == unknown[2]), None)
        names = list(dataclass_type.__dataclass_fields__) if dataclass_type else []
        return f"unknown key {key!r}" + did_you_mean(unknown[1], names, f"known: {', '.join(names)}")
    if "Missing mandatory value" in first_line:
        return f"{key} is not set"
    if "is not a ListConfig" in first_line:
        return f'{key}: expected a list, written "{key}=[a,b]"'
    return f"{key}: {first_line}"


def _dataclasses() -> Iterable[type]:
    from tessera.ctr.data.day_folders import PartitionConfig
    from tessera.ctr.data.schema import FeatureConfig, SchemaConfig

    own = [value for value in globals().values() if isinstance(value, type)]
    return [t for t in own + [FeatureConfig, SchemaConfig, PartitionConfig] if hasattr(t, "__dataclass_fields__")]
