"""Build the tables that a configuration describes: which there are, what a row holds, and the kind that serves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

import torch

from tessera.ctr.config import Config
from tessera.ctr.config_types import EmbeddingConfig, SparseConfig
from tessera.ctr.data.schema import Schema
from tessera.ctr.data.vocabularies import Vocabulary
from tessera.ctr.models.tower import Tower
from tessera.ctr.table_settings import check_named, dims_of, settings_of
from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.no_tables import NoTables
from tessera.distributed.plan import sums_are_smaller
from tessera.distributed.rank import Process
from tessera.distributed.saved.row_files import folder_name
from tessera.distributed.static_tables import StaticTables
from tessera.distributed.tables import Tables, owned_tables
from tessera.embedding.admission import VocabularyFilter
from tessera.embedding.config import DynamicTableConfig, Group, TableConfig, scale_of_range
from tessera.embedding.errors import ConfigError, did_you_mean
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tessera.kernels.formats import code_range, is_int
from tessera.kernels.layout import packed_layout
from tessera.kernels.message import owner_of
from tessera.kernels.mix import mix64

LONGEST_NAME = 255  # bytes of one part of a path, on all usual file systems
BAGS = ("ids", "sequence")  # kinds of features that hold several ids


def build_tables(config: Config, schema: Schema, tower: Tower, ranks: int) -> Tables:
    """Return the tables that the tower wants, static or dynamic as `embedding.kind` says.

    ranks: how many share the tables, and the limits of their rows and bytes.

    Raises:
        ConfigError: a key that this kind cannot serve.
    """
    kind = config.embedding.kind
    check_named(config, schema.tables)
    if not schema.id_names:
        if config.optimizer.helen.rho:
            raise ConfigError(
                f"optimizer.helen.rho is {config.optimizer.helen.rho}, but no feature has ids, so no rows can be "
                "perturbed; set rho=0"
            )
        return NoTables(tower.embedding_dims)
    _check_sequences(config, schema, tower)
    if kind == "static":
        return _static_tables(config, schema, tower)
    return _dynamic_tables(config, schema, tower, ranks)


def give_vocabularies(config: Config, schema: Schema, tables: Tables, process: Process) -> None:
    """Have this rank's tables admit the ids of their vocabularies, where admission asks for one. For training alone:
    no other use of a model adds rows.

    Raises SchemaError: a vocabulary that is not there, or that does not have a table's columns.
    """
    read: dict[str, Vocabulary] = {}
    features = {feature.name: feature for feature in schema.categorical}
    for name, table in owned_tables(tables).items():
        rule = settings_of(config, name)[0].admission
        if rule.kind != "vocabulary":
            continue
        folder = str(rule.vocabulary)
        if folder not in read:
            read[folder] = Vocabulary(folder)
        own = [features[one] for one in schema.tables[name]]
        ids = torch.from_numpy(read[folder].ids_of(name, own, rule.threshold))
        assert isinstance(table.admission, VocabularyFilter)
        table.admission.give(ids[owner_of(mix64(ids), process.world_size) == process.rank])


def _static_tables(config: Config, schema: Schema, tower: Tower) -> StaticTables:
    embedding = config.embedding
    groups: dict[str, Sequence[TableConfig]] = {
        group: [
            TableConfig(f"{table}_{group}", dim, tuple(features), embedding.init_std)
            for table, features in schema.tables.items()
        ]
        for group, dim in tower.embedding_dims.items()
    }
    bags = [feature.name for feature in schema.categorical if feature.kind in BAGS]
    if embedding.l2 and bags:
        raise ConfigError(
            f"embedding.l2 is {embedding.l2}, which decays each row of a bag, and static tables give sums of bags "
            f"alone (feature {bags[0]!r}); set embedding=dynamic or embedding.l2=0"
        )
    optimizer, seed = _row_optimizer(config.optimizer.sparse), config.trainer.seed
    return StaticTables(
        groups, schema.id_names, embedding.rows, optimizer, seed, weighted=schema.weighted, averaged=_averaged(schema)
    )


def _dynamic_tables(config: Config, schema: Schema, tower: Tower, ranks: int) -> DynamicTables:
    embedding = config.embedding
    _check_exceptions(config, tower, schema)
    _check_names(schema)
    tables = [_dynamic_table(config, tower, name, tuple(of), ranks) for name, of in schema.tables.items()]
    if embedding.alpt.every is not None and not any(table.learns_scales for table in tables):
        raise ConfigError(
            f"embedding.alpt.every is {embedding.alpt.every}, but no group has a scale to learn; "
            "set embedding.format or formats to int8, int4 or int2, or alpt.every to null"
        )
    width = sum(tower.embedding_dims.values())  # of a row on its way, whatever its table's
    pools = partial(_pools_before_exchange, config, schema, width, ranks)
    return DynamicTables(
        tables,
        schema.id_names,
        embedding.rows,
        _averaged(schema),
        embedding.transport,
        embedding.oov,
        bag_tables=[table.name for table in tables if pools(table)],
        init=embedding.init,
        timeout_seconds=config.trainer.timeout_seconds,
        dims=tower.embedding_dims,
        sequences=[name for name in schema.id_names if name not in schema.pooled_names],
        squares=embedding.l2 > 0,
        by_host=embedding.exchange == "by_host",
    )


def _check_sequences(config: Config, schema: Schema, tower: Tower) -> None:
    """Raise ConfigError for tables that cannot answer with the row of each event."""
    for table, features in schema.tables.items():
        name = next((one for one in features if one not in schema.pooled_names), None)
        if name is None:
            continue
        why = f"the rows of feature {name!r} reach the tower event by event (pooling: none)"
        if config.embedding.kind == "static":
            raise ConfigError(f"embedding.kind is static, and {why}; set embedding=dynamic or pooling: mean")
        if settings_of(config, table)[0].pooled_output_dist == "always":
            raise ConfigError(
                f"embedding.pooled_output_dist is always for table {table!r}, and {why}; set auto or never"
            )
        if dims_of(config, table, tower.embedding_dims) != dict(tower.embedding_dims):
            raise ConfigError(f"embedding.tables.{table}.dim is below the tower's, and {why}; leave dim out")


def _averaged(schema: Schema) -> list[str]:
    """Return the features whose bags are averaged. A bag of at most one id needs no average."""
    return [feature.name for feature in schema.categorical if feature.kind in BAGS and feature.pooling == "mean"]


def _row_optimizer(sparse: SparseConfig) -> RowOptimizer:
    """Return the optimizer alone, without what changes its rate from step to step."""
    return RowOptimizer(**{field.name: getattr(sparse, field.name) for field in fields(RowOptimizer)})


def _dynamic_table(
    config: Config, tower: Tower, name: str, features: tuple[str, ...], ranks: int
) -> DynamicTableConfig:
    """Return one table's configuration on each of `ranks` ranks, which share its limits."""
    embedding, sparse = settings_of(config, name)
    dims = dims_of(config, name, tower.embedding_dims)
    table = DynamicTableConfig(
        name=name,
        features=features,
        groups=tuple(_group(config, embedding, name, group, dim) for group, dim in dims.items()),
        optimizer=_row_optimizer(sparse),
        seed=config.trainer.seed,
        admission=replace(embedding.admission),
        ttl_seconds=None if embedding.ttl_days is None else int(embedding.ttl_days * 86400),
        max_rows=None if embedding.max_rows is None else -(-embedding.max_rows // ranks),
        max_bytes=None if embedding.max_bytes is None else embedding.max_bytes // ranks,
        cache_rows=None if embedding.cache_rows is None else -(-embedding.cache_rows // ranks),
        cache_bytes=None if embedding.cache_bytes is None else embedding.cache_bytes // ranks,
        eviction=embedding.eviction,
    )
    try:
        table.check_batch(-(-config.trainer.batch_size * len(features) // ranks))
    except ConfigError as error:
        raise error if ranks == 1 else ConfigError(f"{error} (each of {ranks} ranks; limits are over all)") from None
    return table


def _pools_before_exchange(config: Config, schema: Schema, width: int, ranks: int, table: DynamicTableConfig) -> bool:
    """Return whether a table uses the pooled output dist, as embedding.pooled_output_dist says.

    `auto` estimates with the longest bags that the schema allows, and answers no if they have no limit.
    """
    chosen = settings_of(config, table.name)[0].pooled_output_dist
    if any(name not in schema.pooled_names for name in table.features):
        return False
    if chosen != "auto":
        return chosen == "always"
    features = [f for f in schema.categorical if f.name in table.features]
    lengths = [f.max_length if f.kind in BAGS else 1 for f in features]
    limits = [length for length in lengths if length is not None]
    if len(limits) < len(lengths):
        return False
    rows = -(-config.trainer.batch_size // ranks)
    bags, ids = rows * len(limits), rows * sum(limits)
    return sums_are_smaller(bags, ids, config.embedding.rows, width, ranks, weighted=schema.weighted)


def _group(config: Config, embedding: EmbeddingConfig, table: str, name: str, dim: int) -> Group:
    """Return one group of a table with these settings, in the format that `_format` chooses."""
    format = _format(config.embedding, embedding, table, name, dim)
    if not is_int(format):
        return Group(name, dim, embedding.init_std, format, embedding.rounding)
    scale = embedding.scale or scale_of_range(format, embedding.range)
    learned, alpt = None, embedding.alpt
    if alpt.every is not None:
        shared = {"batch": config.trainer.batch_size * dim, "dim": dim, "none": 0}[alpt.gradient_scale]
        gradient_scale = (shared * code_range(format)[1]) ** -0.5 if shared else 1.0
        learned = ScaleOptimizer(alpt.lr, alpt.weight_decay, gradient_scale)
    return Group(name, dim, embedding.init_std, format, embedding.rounding, scale, learned)


def _format(whole: EmbeddingConfig, own: EmbeddingConfig, table: str, name: str, dim: int) -> str:
    """Return the format of a group: that of formats for both or for the table, that of the table, that of formats for
    the group or that of the whole. Those that name no group are left out where they do not make the row smaller."""

    def smaller(format: str) -> str | None:
        # A row of few values would not become smaller: it has a scale beside them and fills whole words.
        return format if packed_layout(format, dim, "sgd").bytes < 4 * dim else None

    exceptions = whole.formats or {}
    has_own = "format" in ((whole.tables or {}).get(table) or {})
    return (
        exceptions.get(f"{table}.{name}")
        or exceptions.get(table)
        or (smaller(own.format) if has_own else None)
        or exceptions.get(name)
        or smaller(own.format)
        or "fp32"
    )


def _check_names(schema: Schema) -> None:
    """Raise ConfigError for a table that has no folder's name in saved states."""
    for table, features in schema.tables.items():
        length = len(folder_name(table))
        if length > LONGEST_NAME:
            raise ConfigError(
                f"data.schema.features: the table of {features[0]!r} is saved in a folder of its name, which takes "
                f"{length} bytes; expected at most {LONGEST_NAME}: give the feature a shorter name (its column keeps "
                "its own) or table"
            )


def _check_exceptions(config: Config, tower: Tower, schema: Schema) -> None:
    formats = config.embedding.formats or {}
    groups, tables = list(tower.embedding_dims), list(schema.tables)
    known = [*groups, *tables, *(f"{table}.{group}" for table in tables for group in groups)]
    for key in formats:
        if "format" in ((config.embedding.tables or {}).get(key) or {}):
            raise ConfigError(
                f"embedding.formats.{key} and embedding.tables.{key}.format are both set; set one of them"
            )
        if key not in known:
            hint = did_you_mean(key, known, f"groups are {', '.join(groups)}")
            raise ConfigError(f"embedding.formats.{key} names no table and no group{hint}")
