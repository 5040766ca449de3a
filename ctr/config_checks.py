"""Check what the types of `ctr/config_types.py` cannot express: values out of range, and keys that contradict each
other."""

from __future__ import annotations

from tessera.ctr.config_types import Config, EmbeddingConfig
from tessera.ctr.daily.config import check_daily
from tessera.ctr.data.config import check_splits
from tessera.ctr.unused_keys import check_unused
from tessera.embedding.errors import ConfigError, did_you_mean
from tessera.kernels.formats import FORMATS, ROUNDINGS


def check(config: Config) -> None:
    """Raise ConfigError for values that no dataclass can check: the key, what was found and what is expected."""
    trainer, optimizer = config.trainer, config.optimizer
    at_least = {
        "trainer.batch_size": (trainer.batch_size, 1),
        "trainer.epochs": (trainer.epochs, 1),
        "trainer.log_every": (trainer.log_every, 1),
        "trainer.max_steps": (trainer.max_steps, 1),
        "trainer.eval_every": (trainer.eval_every, 1),
        "trainer.threads": (trainer.threads, 1),
        "trainer.early_stop.patience": (trainer.early_stop.patience, 1),
        "trainer.checkpoint.every": (trainer.checkpoint.every, 1),
        "trainer.checkpoint.keep_last": (trainer.checkpoint.keep_last, 1),
        "trainer.checkpoint.full_every": (trainer.checkpoint.full_every, 1),
        "embedding.rows": (config.embedding.rows, 1),
        "embedding.l2": (config.embedding.l2, 0),
        "embedding.expire_every": (config.embedding.expire_every, 1),
        "embedding.alpt.every": (config.embedding.alpt.every, 1),
        "optimizer.dense.warmup_steps": (optimizer.dense.warmup_steps, 0),
        "optimizer.sparse.warmup_steps": (optimizer.sparse.warmup_steps, 0),
        "optimizer.plateau.patience": (optimizer.plateau.patience, 1),
        "data.lanes": (config.data.lanes, 1),
        "data.window_rows": (config.data.window_rows, 1),
        "data.threads": (config.data.threads, 1),
    }
    for key, (value, least) in at_least.items():
        if value is not None and value < least:
            raise ConfigError(f"{key} is {value}; expected at least {least}")
    if not 0 <= trainer.seed < 2**63:
        raise ConfigError(f"trainer.seed is {trainer.seed}; expected a whole number from 0 to 2^63 - 1")
    for key, value in {"dense": optimizer.dense.lr, "sparse": optimizer.sparse.lr}.items():
        if not value > 0:
            raise ConfigError(f"optimizer.{key}.lr is {value}; expected a number above 0")
    if optimizer.plateau.factor is not None and not 0 < optimizer.plateau.factor < 1:
        raise ConfigError(f"optimizer.plateau.factor is {optimizer.plateau.factor}; expected null or between 0 and 1")
    if optimizer.dense.name not in ("adam", "sgd", "adagrad"):
        raise ConfigError(f"optimizer.dense.name is {optimizer.dense.name!r}; expected adam, sgd or adagrad")
    if config.embedding.clock not in ("event", "wall"):
        raise ConfigError(f"embedding.clock is {config.embedding.clock!r}; expected event or wall")
    _check_embedding(config.embedding, optimizer.sparse.state_format)
    if config.embedding.ttl_days is not None and config.embedding.clock == "event" and config.data.schema.time is None:
        raise ConfigError(
            "embedding.ttl_days is set, but data.schema.time names no column and embedding.clock is event; "
            "name the column of event times, or set embedding.clock=wall"
        )
    if trainer.cuda_graphs and not trainer.compile:
        raise ConfigError("trainer.cuda_graphs is true; expected trainer.compile true, as the compiler records them")
    if trainer.resume is not None and trainer.run_dir is None:
        raise ConfigError("trainer.resume is set but trainer.run_dir is null; name the folder of the run to go on with")
    check_splits(config.data)
    check_daily(config.daily)
    _check_incremental(config)
    steered = {
        "trainer.early_stop.patience": trainer.early_stop.patience,
        "trainer.eval_every": trainer.eval_every,
        "optimizer.plateau.factor": optimizer.plateau.factor,
    }
    for key, value in steered.items():
        if value is not None and config.data.valid is None:
            raise ConfigError(f"{key} is {value}, but data.valid is null: nothing is evaluated; expected {key}=null")
    check_unused(config)
    if len(config.data.schema.labels) > 1:
        names = ", ".join(config.data.schema.labels)
        raise ConfigError(f"data.schema.labels is [{names}]; expected one label, as one is trained: name it alone")
    if trainer.early_stop.metric not in ("auc", "logloss"):
        raise ConfigError(f"trainer.early_stop.metric is {trainer.early_stop.metric!r}; expected auc or logloss")


def _check_incremental(config: Config) -> None:
    replay, distil, factor = config.trainer.replay, config.trainer.distil, config.optimizer.sparse.old_rows_factor
    if config.embedding.kind == "static" and factor != 1:
        raise ConfigError(
            f"optimizer.sparse.old_rows_factor is {factor}; static tables have no new rows (embedding=dynamic has)"
        )
    if not replay.weight >= 0:
        raise ConfigError(f"trainer.replay.weight is {replay.weight}; expected 0 or above")
    distil.check(config.trainer.epochs)


def _check_embedding(embedding: EmbeddingConfig, state_format: str) -> None:
    choices = {
        "format": (embedding.format, FORMATS),
        **{f"formats.{key}": (value, FORMATS) for key, value in (embedding.formats or {}).items()},
        "rounding": (embedding.rounding, ROUNDINGS),
        "alpt.gradient_scale": (embedding.alpt.gradient_scale, ("batch", "dim", "none")),
        "transport": (embedding.transport, ("fp32", "fp16", "bf16")),
        "oov": (embedding.oov, ("zeros", "learned")),
        "init": (embedding.init, ("random", "oov")),
        "pooled_output_dist": (embedding.pooled_output_dist, ("never", "auto", "always")),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            hint = did_you_mean(value, known, form="{}")
            raise ConfigError(f"embedding.{key} is {value!r}; expected {', '.join(known[:-1])} or {known[-1]}{hint}")
    if embedding.init == "oov" and embedding.oov != "learned":
        raise ConfigError(f"embedding.init is oov; expected embedding.oov=learned, found {embedding.oov}")
    above_zero = {"scale": embedding.scale, "range": embedding.range, "alpt.lr": embedding.alpt.lr}
    for key, number in above_zero.items():
        if number is not None and not number > 0:
            raise ConfigError(f"embedding.{key} is {number}; expected a number above 0")
    of_dynamic = {"embedding.format": embedding.format, "embedding.transport": embedding.transport}
    of_dynamic |= {f"embedding.formats.{key}": value for key, value in (embedding.formats or {}).items()}
    of_dynamic["optimizer.sparse.state_format"] = state_format
    for key, value in of_dynamic.items():
        if embedding.kind == "static" and value != "fp32":
            raise ConfigError(f"{key} is {value}; static tables have fp32 alone (embedding=dynamic has more)")
    alone = {
        "oov": "zeros",
        "pooled_output_dist": "never",
        "init": "random",
        "cache_rows": None,
        "cache_bytes": None,
    }
    for key, only in alone.items():
        if embedding.kind == "static" and getattr(embedding, key) != only:
            raise ConfigError(f"embedding.{key} is {getattr(embedding, key)}; it needs embedding.kind dynamic")
