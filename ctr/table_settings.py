"""Settings of single tables, `embedding.tables`: what each has otherwise than `embedding` and `optimizer.sparse` say
for all of them. A key that a table does not name is that of the whole; null means what it means there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tessera.ctr.config_types import ROW_RATES, Config, EmbeddingConfig, SparseConfig
from tessera.embedding import settings
from tessera.embedding.config import Admission
from tessera.embedding.errors import ConfigError, did_you_mean
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.settings import same_as, section, setting

#: Keys of optimizer.sparse that only some of its optimizers read.
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


@dataclass
class TableOptimizer:
    """The optimizer of one table; its name alone may stand for it. Numbers that the optimizer of the whole reads and
    this one does not are left out."""

    name: str = same_as(RowOptimizer, "name")
    eps: float = same_as(RowOptimizer, "eps")
    beta1: float = same_as(RowOptimizer, "beta1")
    beta2: float = same_as(RowOptimizer, "beta2")
    weight_decay: float = same_as(RowOptimizer, "weight_decay")
    initial_accumulator: float = same_as(RowOptimizer, "initial_accumulator")
    clip_norm: float | None = same_as(RowOptimizer, "clip_norm")
    beta: float = same_as(RowOptimizer, "beta")
    l1: float = same_as(RowOptimizer, "l1")
    l2: float = same_as(RowOptimizer, "l2")
    state_format: str = same_as(RowOptimizer, "state_format")
    old_rows_factor: float = same_as(RowOptimizer, "old_rows_factor")
    decay_count_power: float = same_as(RowOptimizer, "decay_count_power")


@dataclass
class TableSettings:
    """A table is that of a feature, `embedding.tables.user_id.ttl_days=30`, and a key that it does not name is that of
    all tables. null is a value: ttl_days: null means never, whatever the others do."""

    dim: int | None = setting(
        None, "columns of its rows; below the tower's: projected by a learned matrix; null: the tower's", at_least=1
    )
    ttl_days: float | None = same_as(EmbeddingConfig, "ttl_days")
    max_rows: int | None = same_as(EmbeddingConfig, "max_rows")
    max_bytes: int | None = same_as(EmbeddingConfig, "max_bytes")
    eviction: str = same_as(EmbeddingConfig, "eviction")
    lr: float = same_as(RowOptimizer, "lr")
    decay: float = same_as(RowOptimizer, "decay")
    init_std: float = same_as(EmbeddingConfig, "init_std")
    format: str = same_as(EmbeddingConfig, "format")
    rounding: str = same_as(EmbeddingConfig, "rounding")
    scale: float | None = same_as(EmbeddingConfig, "scale")
    range: float = same_as(EmbeddingConfig, "range")
    cache_rows: int | None = same_as(EmbeddingConfig, "cache_rows")
    cache_bytes: int | None = same_as(EmbeddingConfig, "cache_bytes")
    pooled_output_dist: str = same_as(EmbeddingConfig, "pooled_output_dist")
    admission: Admission = section(Admission, "which ids get a row")
    optimizer: TableOptimizer = section(TableOptimizer, "of the rows; a name alone may stand for it: adam")


SECTIONS = {"admission": Admission, "optimizer": TableOptimizer}
OWN = ("dim", "lr", "decay", "optimizer")  # the others are keys of `embedding`


def keys_of_table() -> list[str]:
    """Return the dotted names of all keys of one table, sections included."""
    names = [one.name for one in fields(TableSettings)]
    return names + [f"{name}.{one.name}" for name, kind in SECTIONS.items() for one in fields(kind)]


def typed_tables(tables: Mapping[Any, Any] | None) -> dict[str, dict[str, Any]] | None:
    """Return `embedding.tables` with each value of its type: only the keys that are given, those of `admission` and
    `optimizer` as mappings.

    Raises:
        ConfigError: a key that no table has, with the nearest one, or a value that it does not take.
    """
    return None if tables is None else {str(name): _typed(str(name), given) for name, given in tables.items()}


def _typed(table: str, given: Any) -> dict[str, Any]:
    where = f"embedding.tables.{table}"
    given = _mapping(where, given, TableSettings, "ttl_days: 30")
    if isinstance(given.get("optimizer"), str):
        given = {**given, "optimizer": {"name": given["optimizer"]}}
    for name, kind in SECTIONS.items():
        if name in given:
            given = {**given, name: _mapping(f"{where}.{name}", given[name], kind, f"{fields(kind)[0].name}: ...")}
    for name, value in given.items():
        if value is None and "None" not in next(one.type for one in fields(TableSettings) if one.name == name):
            raise ConfigError(f"{where}.{name} is null; leave the key out, and it is that of all tables")
    try:
        whole = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TableSettings), given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}.{error.full_key}: {str(error).splitlines()[0]}") from None
    settings.check(whole, f"{where}.")
    return {
        name: {key: getattr(getattr(whole, name), key) for key in value} if name in SECTIONS else getattr(whole, name)
        for name, value in given.items()
    }


def _mapping(where: str, given: Any, kind: type, example: str) -> dict[str, Any]:
    """Return what is given for a dataclass; raise ConfigError unless it is a mapping of keys of it."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}; expected keys and values, as {{{example}}}")
    known = [one.name for one in fields(kind)]
    for key in given:
        if key not in known:
            said = f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key '{where}.{key}'{did_you_mean(key, known, said)}")
    return dict(given)


def fill_row_optimizer(config: Config, given: Collection[str]) -> None:
    """Set what `optimizer.sparse` has where the user gave no name or no rate: static tables know no Adam, and what is a
    good rate for one optimizer is none for another.

    given: the keys of `optimizer.sparse` that yaml or command line name.
    """
    sparse = config.optimizer.sparse
    if "name" not in given and config.embedding.kind == "static":
        sparse.name = "rowwise_adagrad"
    if "lr" not in given:
        sparse.lr = ROW_RATES.get(sparse.name, sparse.lr)  # a name that no optimizer has is refused by the checks


def settings_of(config: Config, table: str) -> tuple[EmbeddingConfig, SparseConfig]:
    """Return `embedding` and `optimizer.sparse` as they are for one table, with or without settings of its own."""
    embedding, sparse = config.embedding, config.optimizer.sparse
    given = (embedding.tables or {}).get(table)
    if not given:
        return embedding, sparse
    plain = {key: value for key, value in given.items() if key not in (*OWN, "admission")}
    admission = replace(embedding.admission, **given.get("admission", {}))
    own: dict[str, Any] = dict(given.get("optimizer", {}))
    name = own.get("name", sparse.name)
    first = SparseConfig()
    unread = {key: getattr(first, key) for key, names in READ_BY.items() if name != sparse.name and name not in names}
    if name != sparse.name:
        own["lr"] = ROW_RATES[name]
    own |= {key: given[key] for key in ("lr", "decay") if key in given}
    return replace(embedding, admission=admission, **plain), replace(sparse, **(unread | own))


def dims_of(config: Config, table: str, dims: Mapping[str, int]) -> dict[str, int]:
    """Return the columns of a table's groups where the tower wants `dims`: the widest groups have the table's own dim,
    the others (first order) those of the tower.

    Raises ConfigError: the table's dim is above the tower's.
    """
    dim, widest = ((config.embedding.tables or {}).get(table) or {}).get("dim"), max(dims.values())
    if dim is None:
        return dict(dims)
    if dim > widest:
        raise ConfigError(f"embedding.tables.{table}.dim is {dim}; expected at most {widest}, the dim of the tower")
    return {group: dim if of_tower == widest else of_tower for group, of_tower in dims.items()}


def large_row_rate(config: Config) -> str | None:
    """Return a warning about rates of Adam that are usual for Adagrad, as jobs have that were written when row-wise
    Adagrad was the default; None if there is none."""
    rate = max((sparse.lr for _, sparse in settings_of_all(config) if sparse.name == "adam"), default=0.0)
    if rate <= 0.02:
        return None
    return (
        f"rows learn by Adam at a rate of {rate:g}, where {ROW_RATES['adam']:g} is usual; a rate that was chosen for "
        "row-wise Adagrad, the default of earlier versions, wants optimizer.sparse.name=rowwise_adagrad"
    )


def settings_of_all(config: Config) -> Iterator[tuple[EmbeddingConfig, SparseConfig]]:
    """Yield the settings of the whole, which tables without their own have, and those of each table that has some."""
    yield config.embedding, config.optimizer.sparse
    yield from (settings_of(config, table) for table in config.embedding.tables or {})


def shortest_ttl_days(config: Config) -> float | None:
    """Return the shortest time after which rows of any table expire; None if they never do."""
    return min((e.ttl_days for e, _ in settings_of_all(config) if e.ttl_days is not None), default=None)


def check_named(config: Config, tables: Collection[str]) -> None:
    """Raise ConfigError, one line, for a table of `embedding.tables` that no feature has, and for settings that tables
    cannot have each for itself."""
    for name in config.embedding.tables or {}:
        if name not in tables:
            hint = did_you_mean(name, tables, f"tables are {', '.join(tables) or 'none'}")
            raise ConfigError(f"embedding.tables.{name}: no feature has a table of this name{hint}")
    caches = {name: _has_cache(settings_of(config, name)[0]) for name in tables}
    if len(set(caches.values())) > 1:
        with_, without = (next(name for name, has in caches.items() if has is one) for one in (True, False))
        raise ConfigError(
            f"embedding.tables: {with_} has a cache (cache_rows or cache_bytes) and {without} has none; expected one "
            "for each table or for none, as a step waits for all of them together"
        )


def _has_cache(embedding: EmbeddingConfig) -> bool:
    return embedding.cache_rows is not None or embedding.cache_bytes is not None
