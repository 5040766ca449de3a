"""Define the keys of a configuration and their types. Their meaning is explained in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from tessera.ctr.daily.config import DailyConfig
from tessera.ctr.data.config import DataConfig
from tessera.ctr.distil.config import DistilConfig


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
    oov: str = "zeros"
    init: str = "random"
    pooled_output_dist: str = "never"
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
    scale: float | None = None
    range: float = 0.3
    alpt: AlptConfig = field(default_factory=AlptConfig)
    transport: str = "fp32"


@dataclass
class SideConfig:
    """Keys that the optimizer of the dense tower and that of the tables share."""

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
    keep_last: int = MISSING
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
