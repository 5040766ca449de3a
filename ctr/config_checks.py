"""Check what the types of `ctr/config_types.py` cannot express: values out of range, by the rules that stand there, and
keys that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.ctr.config_types import LOGGERS, Config, EmbeddingConfig
from tessera.ctr.data.config import check_splits
from tessera.ctr.data.errors import SchemaError
from tessera.ctr.data.labels import Label, labels_of
from tessera.ctr.metrics.steering import higher_is_better, is_gauc, terms_of
from tessera.ctr.metrics.tasks import is_single, names_of_metrics
from tessera.ctr.table_settings import settings_of_all, shortest_ttl_days
from tessera.ctr.unused_keys import check_unused
from tessera.embedding import settings
from tessera.embedding.errors import ConfigError, did_you_mean


def check(config: Config) -> None:
    """Raise ConfigError for values that no dataclass can check: the key, what was found and what is expected."""
    settings.check(config)
    trainer, optimizer = config.trainer, config.optimizer
    _check_embedding(config.embedding, optimizer.sparse.state_format)
    of_table = next(
        (f"tables.{name}." for name, one in (config.embedding.tables or {}).items() if one.get("ttl_days")), ""
    )
    if shortest_ttl_days(config) is not None and config.embedding.clock == "event" and config.data.schema.time is None:
        where = of_table if config.embedding.ttl_days is None else ""
        raise ConfigError(
            f"embedding.{where}ttl_days is set, but data.schema.time names no column and embedding.clock is event; "
            "name the column of event times, or set embedding.clock=wall"
        )
    if trainer.cuda_graphs and not trainer.compile:
        raise ConfigError("trainer.cuda_graphs is true; expected trainer.compile true, as the compiler records them")
    if trainer.resume is not None and trainer.run_dir is None:
        raise ConfigError("trainer.resume is set but trainer.run_dir is null; name the folder of the run to go on with")
    for side, schedule in (("dense", optimizer.dense.schedule), ("sparse", optimizer.sparse.schedule)):
        if schedule.kind != "constant" and schedule.steps is None:
            raise ConfigError(
                f"optimizer.{side}.schedule.steps is null, and its kind is {schedule.kind}; expected a number of steps"
            )
    for number, group in enumerate(optimizer.dense.groups):
        settings.check(group, f"optimizer.dense.groups[{number}].")
    _check_loggers(trainer.loggers)
    check_splits(config.data)
    _check_incremental(config)
    steered = {
        "trainer.early_stop.patience": trainer.early_stop.patience,
        "trainer.eval_every": trainer.eval_every,
        "optimizer.plateau.factor": optimizer.plateau.factor,
    }
    for key, value in steered.items():
        if value is not None and config.data.valid is None:
            raise ConfigError(f"{key} is {value}, but data.valid is null: nothing is evaluated; expected {key}=null")
    if trainer.calibration != "none" and config.data.valid is None:
        raise ConfigError(
            f"trainer.calibration is {trainer.calibration}, but data.valid is null; expected a split to fit it on"
        )
    check_unused(config)
    _check_helen(config)
    _check_accumulate(config)
    _check_labels(config)
    config.selection.check()
    _check_selection(config)


def _check_loggers(names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        if name not in LOGGERS:
            raise ConfigError(
                f"trainer.loggers has {name!r}{did_you_mean(name, LOGGERS, 'expected ' + ', '.join(LOGGERS))}"
            )
        if name in names[:number]:
            raise ConfigError(f"trainer.loggers has {name} twice; expected each once")


def _check_selection(config: Config) -> None:
    """Raise ConfigError where gates are asked for that other keys leave no way to learn."""
    method, data = config.selection.method, config.data
    found = f"selection.method is {method}"
    if method != "none" and config.trainer.compile:
        raise ConfigError(f"{found}; expected trainer.compile=false, or none")
    if method in ("autofield", "dnis"):
        if data.valid is None:
            raise ConfigError(f"{found}, which learns on data.valid, and it is null")
        if data.negative_rate != 1:
            raise ConfigError(
                f"{found} and data.negative_rate is {data.negative_rate:g}; expected 1: it learns on the valid split, "
                "which has all negatives"
            )
    if method == "dnis":
        own = next((name for name, one in (config.embedding.tables or {}).items() if "dim" in one), None)
        if config.embedding.kind != "dynamic" or own is not None:
            other = f"embedding.tables.{own}.dim is set" if own else f"embedding.kind is {config.embedding.kind}"
            raise ConfigError(f"{found} and {other}; expected dynamic tables of the tower's dim")
    if method == "optfs" and config.trainer.accumulate > 1:
        raise ConfigError(f"{found} and trainer.accumulate is {config.trainer.accumulate}; expected 1")


def _check_labels(config: Config) -> None:
    try:
        labels = labels_of(config.data.schema.labels)
    except SchemaError as error:
        raise ConfigError(f"data.{error}") from None
    ranked = next((label for label in labels if label.loss in ("pairwise", "jrc")), None)
    if ranked is not None and config.data.schema.group is None:
        raise ConfigError(
            f"data.schema.labels: the loss of {ranked.name!r} is {ranked.loss}, which compares rows of a group; "
            "expected data.schema.group, the column that names it"
        )
    _check_negatives(config, labels)
    metric, known = config.trainer.early_stop.metric, list(names_of_metrics(labels))
    try:
        if labels:
            higher_is_better(labels, metric)
            if config.data.schema.group is None and any(is_gauc(term) for _, term in terms_of(metric, known)):
                raise ConfigError(
                    f"trainer.early_stop.metric is {metric}, and data.schema.group is null; expected the column that "
                    "names the groups of gauc, as a user"
                )
    except ValueError as error:
        if "rewards" in str(error):
            raise ConfigError(
                f"trainer.early_stop.metric {error}; expected one that is better the more it is"
            ) from None
        *most, last = known
        listed = f"{', '.join(most)} or {last}" if most else last
        raise ConfigError(
            f"trainer.early_stop.metric is {metric!r}; expected {listed}, or a sum of them with factors"
            f"{did_you_mean(metric, known, form='{}')}"
        ) from None


def _check_negatives(config: Config, labels: Sequence[Label]) -> None:
    """Raise ConfigError where negatives are left out and no correction of one logit makes up for it."""
    rate = config.data.negative_rate
    if rate > 1:
        raise ConfigError(f"data.negative_rate is {rate:g}; expected more than 0, at most 1")
    if rate == 1 or not labels:
        return
    found = f"data.negative_rate is {rate:g}"
    if not is_single(labels) or not labels[0].is_plain:
        names = ", ".join(f"{label.name} ({label.loss})" for label in labels)
        raise ConfigError(f"{found}, and data.schema.labels has {names}; expected one label with plain cross-entropy")
    if config.trainer.distil.kind != "none":
        raise ConfigError(f"{found}, and a teacher's logits are of all rows; expected trainer.distil.kind=none, or 1")


def _check_incremental(config: Config) -> None:
    factor = config.optimizer.sparse.old_rows_factor
    if config.embedding.kind == "static" and factor != 1:
        raise ConfigError(
            f"optimizer.sparse.old_rows_factor is {factor}; static tables have no new rows (embedding=dynamic has)"
        )
    config.trainer.distil.check(config.trainer.epochs)


def _check_helen(config: Config) -> None:
    if not config.optimizer.helen.rho:
        return
    found = f"optimizer.helen.rho is {config.optimizer.helen.rho}, and "
    if config.embedding.alpt.every is not None:
        raise ConfigError(
            f"{found}embedding.alpt.every is {config.embedding.alpt.every}: each wants the second pass of a step; "
            "set rho=0 or alpt.every=null"
        )
    for embedding, _ in settings_of_all(config):
        key = next((key for key in ("cache_rows", "cache_bytes") if getattr(embedding, key) is not None), None)
        if key is not None:
            raise ConfigError(
                f"{found}{key} is {getattr(embedding, key)}: tables with a cache have no pass over perturbed rows; "
                f"set rho=0 or {key}=null"
            )


def _check_accumulate(config: Config) -> None:
    """Raise ConfigError for what updates something with each batch, or weighs a batch by itself."""
    accumulate, trainer = config.trainer.accumulate, config.trainer
    if accumulate == 1:
        return
    found = f"trainer.accumulate is {accumulate}, and "
    if config.embedding.kind == "static":
        raise ConfigError(
            f"{found}static tables update rows in each batch; expected embedding=dynamic, or accumulate=1"
        )
    if config.embedding.alpt.every is not None or config.optimizer.helen.rho:
        twice = "optimizer.helen.rho" if config.optimizer.helen.rho else "embedding.alpt.every"
        raise ConfigError(
            f"{found}{twice} makes steps of two passes over one batch; expected {twice} unset, or accumulate=1"
        )
    if trainer.loss_divisor != "batch":
        raise ConfigError(
            f"{found}trainer.loss_divisor is {trainer.loss_divisor}, which divides by the rows of one batch; expected "
            "batch, or accumulate=1"
        )
    for embedding, _ in settings_of_all(config):
        key = next((key for key in ("cache_rows", "cache_bytes") if getattr(embedding, key) is not None), None)
        if key is not None:
            raise ConfigError(f"{found}{key} is {getattr(embedding, key)}; expected null, or accumulate=1")


def _check_embedding(embedding: EmbeddingConfig, state_format: str) -> None:
    if embedding.init == "oov" and embedding.oov != "learned":
        raise ConfigError(f"embedding.init is oov; expected embedding.oov=learned, found {embedding.oov}")
    of_dynamic = {"embedding.format": embedding.format, "embedding.transport": embedding.transport}
    of_dynamic |= {f"embedding.formats.{key}": value for key, value in (embedding.formats or {}).items()}
    of_dynamic["optimizer.sparse.state_format"] = state_format
    for key, value in of_dynamic.items():
        if embedding.kind == "static" and value != "fp32":
            raise ConfigError(f"{key} is {value}; static tables have fp32 alone (embedding=dynamic has more)")
