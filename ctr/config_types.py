"""Define the keys of a configuration: their types, defaults, meaning, and which values each one takes.

What `setting` says here is all that there is: conf/ holds choices, and help, documentation and checks are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tessera.ctr.daily.config import DailyConfig
from tessera.ctr.data.config import DataConfig
from tessera.ctr.distil.config import DistilConfig
from tessera.ctr.selection.config import SelectionConfig
from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tessera.embedding.settings import same_as, section, setting
from tessera.kernels.formats import FORMATS

LOGGERS = ("tensorboard", "mlflow", "wandb")  # of ctr/runs/loggers.py, which has a class for each


@dataclass
class AlptConfig:
    every: int | None = setting(
        None, "steps from one update of scales to the next, which takes a second pass; null: LPT", at_least=1
    )
    lr: float = same_as(ScaleOptimizer, "lr")
    weight_decay: float = same_as(ScaleOptimizer, "weight_decay")
    gradient_scale: str = setting(
        "batch",
        "of scales: batch: 1 / sqrt(batch size x dim x largest code) | dim: without batch | none",
        choices=("batch", "dim", "none"),
    )


@dataclass
class EmbeddingConfig:
    """The tables and the life of their rows (docs/tables.md)."""

    kind: str = setting(
        "dynamic", "dynamic: a row for every id | static: a fixed number of rows", choices=("dynamic", "static")
    )
    rows: int = setting(
        1_000_000, "rows per table that the plan counts with; a dynamic table may grow beyond it", at_least=1
    )
    init_std: float = same_as(Group, "init_std", default=0.01)
    l2: float = setting(
        0.0, "adds l2/2 * |row|^2 per look-up to the loss; rows that a batch does not touch do not decay", at_least=0
    )
    oov: str = setting(
        "zeros",
        "what an id without a row reads: zeros | learned: one row per table, trained as a dense weight",
        choices=("zeros", "learned"),
    )
    init: str = setting(
        "random",
        "first values of a new row: random, from (seed, table, id) | oov: the learned OOV row as it is then",
        choices=("random", "oov"),
    )
    admission: Admission = section(Admission, "which ids get a row")
    ttl_days: float | None = setting(None, "rows not seen for so long expire; null: never", above=0)
    expire_every: int = setting(
        50, "steps from one look for rows to expire to the next; each looks at a part of a large table", at_least=1
    )
    clock: str = setting(
        "event",
        "what time it is: event: by the event times of batches (docs/tables.md) | wall: the wall clock",
        choices=("event", "wall"),
    )
    max_rows: int | None = same_as(
        DynamicTableConfig, "max_rows", "most rows of one table, over all ranks; null: memory"
    )
    max_bytes: int | None = setting(None, "most bytes of one table, over all ranks", at_least=1)
    cache_rows: int | None = same_as(
        DynamicTableConfig,
        "cache_rows",
        "tables stay in host memory, the device holds so many rows of each, over all ranks; null: all",
    )
    cache_bytes: int | None = setting(
        None, "the same in bytes of values and optimizer state; docs/cache.md", at_least=1
    )
    eviction: str = same_as(DynamicTableConfig, "eviction")
    format: str = same_as(Group, "format")
    formats: dict[str, str] | None = setting(
        None,
        "other formats, of a group, a table or one of both: {w: fp16, item_id: int4, item_id.v: int8}",
        choices=FORMATS,
    )
    rounding: str = same_as(Group, "rounding")
    scale: float | None = setting(
        None, "int formats: the scale that a row begins with; null: range / 2^(bits - 1)", above=0
    )
    range: float = setting(0.3, "int formats: the largest value that the first scale allows for", above=0)
    alpt: AlptConfig = section(AlptConfig, "learned scales (ALPT); without it they stay as they begin (LPT)")
    tables: dict[str, Any] | None = setting(
        None,
        "what single tables have otherwise: {user_id: {ttl_days: 30, dim: 8}}; the keys are those of one table, below",
    )
    pooled_output_dist: str = setting(
        "never",
        "bags travel as sums of owners, not as rows: never | auto: where that is less | always",
        choices=("never", "auto", "always"),
    )
    transport: str = setting(
        "fp32",
        "rows on their way between ranks: fp32 | fp16 (gradients then as bf16) | bf16",
        choices=("fp32", "fp16", "bf16"),
    )
    exchange: str = setting(
        "flat",
        "how ids and rows travel: flat: straight to owners | by_host: merged inside a host before they leave it",
        choices=("flat", "by_host"),
    )


@dataclass
class ParameterGroup:
    """Dense weights with numbers of their own (docs/training.md)."""

    pattern: str = setting("", "names of dense weights, with * and ?: '*.bias'; of several groups the first one counts")
    lr: float | None = setting(None, "their learning rate; null: optimizer.dense.lr", above=0)
    weight_decay: float | None = setting(None, "their weight decay; null: optimizer.dense.weight_decay", at_least=0)


SCHEDULES = ("constant", "cosine", "step", "exponential")
WARMUP = "the learning rate grows linearly over this many steps"


@dataclass
class ScheduleConfig:
    """How a learning rate falls once warm-up has ended."""

    kind: str = setting("constant", "constant | cosine | step | exponential", choices=SCHEDULES)
    steps: int | None = setting(
        None, "cosine: from the full rate to the floor; step, exponential: from one factor to the next", at_least=1
    )
    factor: float = setting(0.1, "step, exponential: on the rate, once in so many steps", above=0, below=1)
    floor: float = setting(0.01, "the rate never falls below this share of itself", above=0, at_most=1)


@dataclass
class AverageConfig:
    """An exponential moving average of the dense weights (docs/training.md)."""

    decay: float | None = setting(
        None, "share of the average that stays in a step, as 0.999; null: no average", above=0, below=1
    )
    evaluate: bool = setting(
        True, "evaluation, the kept model, exports and publications have the averaged weights, not the trained ones"
    )


DENSE_OPTIMIZERS = ("adam", "adamw", "sgd", "adagrad")


@dataclass
class DenseConfig:
    name: str = setting(
        "adam", "adam | adamw: weight decay apart from the gradient | sgd | adagrad", choices=DENSE_OPTIMIZERS
    )
    lr: float = setting(0.001, "learning rate of the dense weights", above=0)
    beta1: float = setting(0.9, "decay of the first moment of adam and adamw", at_least=0, below=1)
    beta2: float = setting(0.999, "decay of their second moment", at_least=0, below=1)
    eps: float = setting(1.0e-8, "keeps the divisor of adam, adamw and adagrad above 0", at_least=0)
    weight_decay: float = setting(
        0.0, "L2 added to the gradient; adamw: weights keep 1 - lr * weight_decay in a step", at_least=0
    )
    groups: list[ParameterGroup] = setting(
        [], "weights with a rate or decay of their own, by name: [{pattern: '*.bias', weight_decay: 0}]"
    )
    ema: AverageConfig = section(AverageConfig, "a moving average of the dense weights")
    clip_norm: float | None = setting(None, "largest norm of the dense gradient; null: no clipping", above=0)
    warmup_steps: int = setting(0, WARMUP, at_least=0)
    schedule: ScheduleConfig = section(ScheduleConfig, "how the rate falls after warm-up (docs/training.md)")


#: Learning rates of rows by optimizer, where none is given (docs/optimizers.md says what they were chosen by).
ROW_RATES = {"adam": 0.0015, "rowwise_adagrad": 0.02, "adagrad": 0.02, "sgd": 0.05, "ftrl": 0.05}


@dataclass
class SparseConfig(RowOptimizer):
    """That of rows, and what changes its rate from step to step."""

    name: str = same_as(
        RowOptimizer,
        "name",
        "adam | rowwise_adagrad | adagrad | sgd | ftrl (static tables: rowwise_adagrad, adagrad or sgd, and unless one "
        "is given, the first)",
        default="adam",
    )
    lr: float = same_as(
        RowOptimizer,
        "lr",
        "learning rate of the rows; unless given, that of the optimizer: "
        + ", ".join(f"{name} {rate}" for name, rate in ROW_RATES.items()),
        default=ROW_RATES["adam"],
    )
    warmup_steps: int = setting(0, WARMUP, at_least=0)
    schedule: ScheduleConfig = section(ScheduleConfig, "how the rate falls after warm-up (docs/training.md)")


@dataclass
class PlateauConfig:
    factor: float | None = setting(None, "multiply them by this; null: never", above=0, below=1)
    patience: int = setting(
        1, "after so many evaluations in a row without a new best, and again after as many more", at_least=1
    )
    floor: float = setting(1.0e-6, "never below this", at_least=0)


@dataclass
class HelenConfig:
    """A second pass at perturbed rows, whose gradients update them (docs/optimizers.md)."""

    rho: float = setting(
        0.0, "how far the rows of a table move together, 0.05 in the paper; 0: one pass, plain training", at_least=0
    )
    xi: float = setting(
        0.3, "least share of it for rare ids; 1: all ids alike (SAM for each table)", at_least=0, at_most=1
    )
    dense: bool = setting(
        False, "perturb dense weights, too (SAM); false: they are updated by the gradient of the first pass"
    )


@dataclass
class OptimizerConfig:
    """How dense weights and rows are updated."""

    dense: DenseConfig = section(DenseConfig, "of the dense weights")
    sparse: SparseConfig = section(SparseConfig, "of the rows of tables")
    helen: HelenConfig = section(HelenConfig, "frequency-wise sharpness-aware steps; docs/optimizers.md")
    plateau: PlateauConfig = section(
        PlateauConfig, "lower both learning rates when the metric of trainer.early_stop stops getting better"
    )


@dataclass
class EarlyStopConfig:
    metric: str = setting(
        "auc",
        "auc | gauc | logloss | normalized_entropy | a sum, as auc-0.5*logloss; on the valid split; the best model by "
        "it is kept. Of several labels buy.auc is that of one, and auc the mean over all",
    )
    patience: int | None = setting(None, "stop after this many evaluations without a new best; null: never", at_least=1)


@dataclass
class CheckpointConfig:
    folder: str | None = setting(None, "a folder or URI; null: checkpoints/ in the run folder")
    every: int | None = setting(
        None,
        "steps between saved states; null: at the end of each epoch. There is always one at the end",
        at_least=1,
    )
    keep_last: int = setting(2, "newest states that are kept", at_least=1)
    overlap: bool = setting(True, "write while training goes on, if memory for the rows that change meanwhile is free")
    full_every: int = setting(
        1, "every so many states one with all rows, between them only what changed; 1: all are full", at_least=1
    )


@dataclass
class WarmStartConfig:
    path: str | None = setting(None, "a state, a run's checkpoints/ or a run's best/; null: begin from nothing")
    rename: list[str] = setting(
        [], "old:new, names of tables and modules that are called differently here: [user:user_id]"
    )
    optimizer: bool = setting(True, "keep optimizer state, dense and of rows, where the optimizer is the same")


@dataclass
class ReplayConfig:
    path: str | None = setting(None, "a sample of them, as ctr/data/reservoir.py writes; null: none")
    weight: float = setting(1.0, "on their sample weights", at_least=0)


@dataclass
class ProfileConfig:
    """A trace of some steps by torch's profiler (docs/training.md)."""

    start: int | None = setting(None, "the first step of the trace, counted from 1; null: no trace", at_least=1)
    steps: int = setting(3, "how many steps it has", at_least=1)


@dataclass
class TrainerConfig:
    """The training loop; the batch size is the global one, over all ranks."""

    run_dir: str | None = setting(None, "where everything about the run is written; null: runs/<data>-<model>-<time>")
    seed: int = setting(
        2026,
        "of initial values, shuffle and dropout",
        at_least=0,
        below=2**63,
        expected="a whole number from 0 to 2^63 - 1",
    )
    batch_size: int = setting(4096, "rows of one batch over all ranks", at_least=1)
    accumulate: int = setting(
        1, "batches of one step, whose gradients add up before anything is updated (docs/training.md)", at_least=1
    )
    epochs: int = setting(1, "passes over the training rows", at_least=1)
    max_steps: int | None = setting(None, "stop after this many steps", at_least=1)
    shuffle: bool = setting(True, "of the training rows: row groups, then rows inside a window")
    device: str = setting("auto", "auto | cpu | cuda", choices=("auto", "cpu", "cuda"))
    threads: int | None = setting(
        None, "threads of dense math per rank; null: cores divided by the ranks of this host", at_least=1
    )
    amp: bool = setting(False, "run the tower in bfloat16")
    tf32: bool = setting(
        True, "on a GPU: multiply float32 matrices of the tower in TF32, of 10 bits precision, several times faster"
    )
    compile: bool = setting(
        False, "run the tower through torch.compile: slow to start (minutes), then faster or not, by model"
    )
    cuda_graphs: bool = setting(
        False, "on a GPU, with compile: launch the compiled tower as CUDA graphs, one for each size of batch"
    )
    log_every: int = setting(50, "steps between log lines; the host waits for the device only then", at_least=1)
    loggers: list[str] = setting(
        ["tensorboard"], "get the numbers of metrics.jsonl, too: tensorboard, mlflow, wandb (docs/training.md)"
    )
    eval_every: int | None = setting(None, "steps between evaluations; null: at the end of each epoch", at_least=1)
    profile: ProfileConfig = section(ProfileConfig, "trace some steps into profile/ in the run folder")
    early_stop: EarlyStopConfig = section(EarlyStopConfig, "end a run that gets no better")
    resume: str | None = setting(
        None,
        "auto: go on with run_dir from its newest state, or begin | a state's folder, where run_dir has none yet | "
        "null: a new run; after a restart by torchrun as auto (docs/checkpoints.md)",
    )
    checkpoint: CheckpointConfig = section(CheckpointConfig, "saved states, from which a run goes on")
    warm_start: WarmStartConfig = section(WarmStartConfig, "begin a new run with what another one has learnt")
    replay: ReplayConfig = section(
        ReplayConfig, "earlier rows, trained on as more rows of the training split (docs/incremental.md)"
    )
    distil: DistilConfig = section(DistilConfig, "learn from a teacher beside the labels (docs/incremental.md)")
    loss_divisor: str = setting(
        "batch",
        "divides the loss of a label: batch: the weight of all rows, the same for every label | "
        "task: that of the rows in which it counts (docs/labels.md)",
        choices=("batch", "task"),
    )
    calibration: str = setting(
        "none",
        "of the best model's probabilities, fitted on the valid split behind training: none | platt: slope and "
        "intercept of the logit | isotonic: knots (docs/metrics.md)",
        choices=("none", "platt", "isotonic"),
    )
    timeout_seconds: float = setting(300.0, "longest wait for another rank", above=0)


@dataclass
class ExportConfig:
    """What training promises of an export (docs/export.md)."""

    check: str = setting(
        "always",
        "export the untrained model before the first step, and end where it cannot leave: always | never | "
        "auto: models that are not Tessera's own",
        choices=("always", "auto", "never"),
    )
    published: bool = setting(
        True, "of each day that is published score golden rows by an export, before it is to be served (tessera daily)"
    )


@dataclass
class Config:
    """Everything a run depends on; saved resolved as `config.yaml` in the run folder."""

    data: DataConfig = section(DataConfig, "what to read")
    model: dict[str, Any] = field(default_factory=dict)
    numeric: dict[str, Any] = field(default_factory=dict)
    embedding: EmbeddingConfig = section(EmbeddingConfig, "how tables store rows")
    optimizer: OptimizerConfig = section(OptimizerConfig, "how dense weights and rows are updated")
    trainer: TrainerConfig = section(TrainerConfig, "the loop")
    daily: DailyConfig = section(DailyConfig, "the loop over days (tessera daily)")
    selection: SelectionConfig = section(SelectionConfig, "gates that rank the fields while the model is trained")
    export: ExportConfig = section(ExportConfig, "what training promises of an export")
