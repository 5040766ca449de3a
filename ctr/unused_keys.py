"""Refuse keys that are set but have no effect: whoever sets one believes that it works, so it ends the job as a wrong
one does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from tessera.ctr.config_types import Config, EmbeddingConfig
from tessera.ctr.table_settings import READ_BY, settings_of, settings_of_all
from tessera.embedding.errors import ConfigError
from tessera.kernels.formats import is_int

#: Keys of optimizer.dense that only some of its optimizers read.
READ_BY_DENSE = {"beta1": ("adam", "adamw"), "beta2": ("adam", "adamw"), "eps": ("adam", "adamw", "adagrad")}
OF_STATIC = ("kind", "rows", "init_std", "l2")  # of EmbeddingConfig


def check_unused(config: Config) -> None:
    """Raise ConfigError for the first key of `embedding` or `optimizer` that differs from its default and does
    nothing beside the others: the key, its value, and what would make it work."""
    if config.embedding.kind == "static":
        _check_static(config)
    else:
        _check_dynamic(config)
    _check_optimizers(config)
    if config.trainer.profile.start is None:
        _refuse("trainer.profile", config.trainer.profile, ["steps"], "needs trainer.profile.start, which is null")


def _check_static(config: Config) -> None:
    embedding, sparse = config.embedding, config.optimizer.sparse
    keys = [field.name for field in fields(embedding) if field.name not in (*OF_STATIC, "admission", "alpt")]
    dynamic = "static tables do not read; expected {default}, or embedding=dynamic"
    _refuse("embedding", embedding, keys, dynamic)
    for part in ("admission", "alpt"):
        section = getattr(embedding, part)
        _refuse(f"embedding.{part}", section, [field.name for field in fields(section)], dynamic)
    of_rows = ["weight_decay", "decay", "decay_count_power", "initial_accumulator", "clip_norm"]
    _refuse("optimizer.sparse", sparse, of_rows, dynamic)
    _refuse("optimizer.helen", config.optimizer.helen, ["rho", "xi", "dense"], dynamic)


def _check_dynamic(config: Config) -> None:
    """A key of the whole must be read by some table, one of a single table by that table."""
    for rules in zip(*(_rules(embedding) for embedding, _ in settings_of_all(config)), strict=True):
        if not any(rule.is_read for rule in rules):
            section = config.embedding if rules[0].section is None else getattr(config.embedding, rules[0].section)
            _refuse(_dotted("embedding", rules[0].section), section, rules[0].keys, rules[0].why)
    for table, given in (config.embedding.tables or {}).items():
        for rule in _rules(settings_of(config, table)[0]):
            own = given if rule.section is None else given.get(rule.section, {})
            for key in rule.keys:
                if not rule.is_read and key in own:
                    where = _dotted(f"embedding.tables.{table}", rule.section)
                    raise ConfigError(f"{where}.{key} is {own[key]}, which {rule.why}")


def _dotted(where: str, section: str | None) -> str:
    return where if section is None else f"{where}.{section}"


class Rule(NamedTuple):
    """Keys of `embedding`, or of a section in it, whether anything reads them, and what is said if nothing does."""

    section: str | None
    keys: Sequence[str]
    is_read: bool
    why: str


def _rules(embedding: EmbeddingConfig) -> list[Rule]:
    """Return what one table with these settings reads."""
    kind, learns = embedding.admission.kind, embedding.alpt.every is not None
    formats = [embedding.format, *(embedding.formats or {}).values()]
    needs = "needs embedding.alpt.every, which is null: no scale is learned"
    only = f"only int formats read; embedding.format is {formats[0]}"
    return [
        Rule("admission", ["threshold"], kind != "none", "needs embedding.admission.kind; it is none"),
        Rule(
            "admission",
            ["capacity", "splits"],
            kind == "sliding",
            f"only embedding.admission.kind=sliding reads; it is {kind}",
        ),
        Rule(
            "admission",
            ["vocabulary"],
            kind == "vocabulary",
            f"only embedding.admission.kind=vocabulary reads; it is {kind}",
        ),
        Rule("alpt", ["lr", "weight_decay", "gradient_scale"], learns, needs),
        Rule(
            None,
            ["rounding"],
            any(one != "fp32" for one in formats),
            "only low precision reads; embedding.format is fp32",
        ),
        Rule(None, ["scale", "range"], any(map(is_int, formats)), only),
        Rule(None, ["range"], embedding.scale is None, "embedding.scale takes the place of; set one of them"),
        Rule(
            None,
            ["eviction"],
            embedding.max_rows is not None or embedding.max_bytes is not None,
            "needs a limit: embedding.max_rows or max_bytes",
        ),
    ]


def _check_optimizers(config: Config) -> None:
    optimizer = config.optimizer
    sides = (
        ("sparse", [sparse.name for _, sparse in settings_of_all(config)], READ_BY),
        ("dense", [optimizer.dense.name], READ_BY_DENSE),
    )
    for side, used, read_by in sides:
        section = getattr(optimizer, side)
        for key, names in read_by.items():
            if not set(used) & set(names):
                _refuse(f"optimizer.{side}", section, [key], _only(names, f"optimizer.{side}.name is {section.name}"))
    for table, given in (config.embedding.tables or {}).items():
        name = settings_of(config, table)[1].name
        for key, value in given.get("optimizer", {}).items():
            if name not in READ_BY.get(key, (name,)):
                where = f"embedding.tables.{table}.optimizer"
                raise ConfigError(
                    f"{where}.{key} is {value}, which {_only(READ_BY[key], f'that of {table} is {name}')}"
                )
    if not any(sparse.decay for _, sparse in settings_of_all(config)):
        needs = "needs optimizer.sparse.decay, which is 0: rows keep their values"
        _refuse("optimizer.sparse", optimizer.sparse, ["decay_count_power"], needs)
    for side in ("dense", "sparse"):
        where, schedule = f"optimizer.{side}.schedule", getattr(optimizer, side).schedule
        if schedule.kind == "constant":
            _refuse(where, schedule, ["steps", "factor", "floor"], f"needs {where}.kind; it is constant")
        if schedule.kind == "cosine":
            _refuse(where, schedule, ["factor"], f"only step and exponential read; {where}.kind is cosine")
    if not optimizer.helen.rho:
        _refuse("optimizer.helen", optimizer.helen, ["xi", "dense"], "needs optimizer.helen.rho; it is 0")
    if optimizer.dense.ema.decay is None:
        _refuse("optimizer.dense.ema", optimizer.dense.ema, ["evaluate"], "needs optimizer.dense.ema.decay")
    if optimizer.plateau.factor is None:
        needs = "needs optimizer.plateau.factor, which is null: rates are never lowered"
        _refuse("optimizer.plateau", optimizer.plateau, ["patience", "floor"], needs)


def _only(names: Sequence[str], found: str) -> str:
    return f"only {' and '.join(names)} read{'s' * (len(names) == 1)}; {found}"


def _refuse(where: str, section: Any, keys: Sequence[str], why: str) -> None:
    for field in fields(section):
        value, default = getattr(section, field.name), field.default
        if field.name in keys and value != default:
            shown = "null" if default is None else default
            raise ConfigError(f"{where}.{field.name} is {value}, which {why.format(default=shown)}")
