"""Refuse keys that are set but have no effect: whoever sets one believes that it works, so it ends the job as a wrong
one does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from tessera.ctr.config_types import Config, EmbeddingConfig, OptimizerConfig
from tessera.embedding.errors import ConfigError
from tessera.kernels.formats import is_int

OF_STATIC = ("kind", "rows", "init_std", "l2")  # of EmbeddingConfig
#: Keys of optimizer.sparse and optimizer.dense that only some of their optimizers read.
READ_BY = {
    "beta1": ("adam",),
    "beta2": ("adam",),
    "beta": ("ftrl",),
    "l1": ("ftrl",),
    "l2": ("ftrl",),
    "eps": ("adam", "adagrad", "rowwise_adagrad"),
    "initial_accumulator": ("adagrad", "rowwise_adagrad"),
    "state_format": ("adam",),
}


def check_unused(config: Config) -> None:
    """Raise ConfigError for the first key of `embedding` or `optimizer` that differs from its default and does
    nothing beside the others: the key, its value, and what would make it work."""
    if config.embedding.kind == "static":
        _check_static(config)
    else:
        _check_dynamic(config.embedding)
    _check_optimizers(config.optimizer)


def _check_static(config: Config) -> None:
    embedding, sparse = config.embedding, config.optimizer.sparse
    keys = [field.name for field in fields(embedding) if field.name not in (*OF_STATIC, "admission", "alpt")]
    dynamic = "static tables do not read; expected {default}, or embedding=dynamic"
    _refuse("embedding", embedding, keys, dynamic)
    for part in ("admission", "alpt"):
        section = getattr(embedding, part)
        _refuse(f"embedding.{part}", section, [field.name for field in fields(section)], dynamic)
    _refuse("optimizer.sparse", sparse, ["weight_decay", "initial_accumulator"], dynamic)


def _check_dynamic(embedding: EmbeddingConfig) -> None:
    admission, formats = embedding.admission, [embedding.format, *(embedding.formats or {}).values()]
    if admission.kind == "none":
        _refuse("embedding.admission", admission, ["threshold"], "needs embedding.admission.kind; it is none")
    if admission.kind != "sliding":
        only = f"only embedding.admission.kind=sliding reads; it is {admission.kind}"
        _refuse("embedding.admission", admission, ["capacity", "splits"], only)
    if embedding.alpt.every is None:
        needs = "needs embedding.alpt.every, which is null: no scale is learned"
        _refuse("embedding.alpt", embedding.alpt, ["lr", "weight_decay", "gradient_scale"], needs)
    if all(one == "fp32" for one in formats):
        _refuse("embedding", embedding, ["rounding"], "only low precision reads; embedding.format is fp32")
    if not any(is_int(one) for one in formats):
        _refuse("embedding", embedding, ["scale", "range"], f"only int formats read; embedding.format is {formats[0]}")
    if embedding.scale is not None:
        _refuse("embedding", embedding, ["range"], "embedding.scale takes the place of; set one of them")
    if embedding.max_rows is None and embedding.max_bytes is None:
        _refuse("embedding", embedding, ["eviction"], "needs a limit: embedding.max_rows or max_bytes")


def _check_optimizers(optimizer: OptimizerConfig) -> None:
    for side in ("sparse", "dense"):
        section = getattr(optimizer, side)
        for key, names in READ_BY.items():
            if hasattr(section, key) and section.name not in names:
                only = (
                    f"only {' and '.join(names)} read{'s' * (len(names) == 1)}; optimizer.{side}.name is {section.name}"
                )
                _refuse(f"optimizer.{side}", section, [key], only)
    if optimizer.plateau.factor is None:
        needs = "needs optimizer.plateau.factor, which is null: rates are never lowered"
        _refuse("optimizer.plateau", optimizer.plateau, ["patience", "floor"], needs)


def _refuse(where: str, section: Any, keys: Sequence[str], why: str) -> None:
    for field in fields(section):
        value, default = getattr(section, field.name), field.default
        if field.name in keys and value != default:
            shown = "null" if default is None else default
            raise ConfigError(f"{where}.{field.name} is {value}, which {why.format(default=shown)}")
