"""The whole model: sharded tables below, the tower on top."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.schema import Schema
from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.dropout import draw_masks, dropout_layers
from tessera.ctr.models.instantiate import instantiate
from tessera.ctr.models.numeric import Raw
from tessera.ctr.models.tower import Fields, Tower
from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.no_tables import NoTables
from tessera.distributed.plan import sums_are_smaller
from tessera.distributed.saved.row_files import folder_name
from tessera.distributed.static_tables import StaticTables
from tessera.distributed.tables import Tables, growing
from tessera.embedding.config import Admission, DynamicTableConfig, Group, TableConfig, step_of_range
from tessera.embedding.errors import ConfigError, did_you_mean
from tessera.embedding.optim import RowOptimizer, StepOptimizer
from tessera.kernels.formats import code_range, is_int
from tessera.kernels.layout import packed_layout

LONGEST_NAME = 255  # bytes of one part of a path, on all usual file systems


class Network(nn.Module):
    """Tables -> tower -> logit. With `amp` the tower runs in bfloat16; tables and logits stay float32.

    Attributes:
        step: number of the training step, by which dropout draws its masks; set before the forward pass.
    """

    def __init__(self, tables: Tables, tower: Tower, id_names: Sequence[str], amp: bool, seed: int = 0) -> None:
        super().__init__()
        self.tables = tables
        self.tower = tower
        self.id_names = tuple(id_names)
        self.amp = amp
        self.seed, self.step = seed, 0
        self._dropout = dropout_layers(tower)
        self._batch_norm = [module for module in tower.modules() if isinstance(module, BatchNorm)]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns logits [B] float32 and the looked-up embeddings, group -> [B, id fields, dim] float32."""
        if self.training:
            self._tell(batch)
        embeddings = self.tables(batch.ids)
        with torch.autocast(batch.numeric.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.tower(batch.numeric, embeddings)
        return logits.float(), embeddings

    def _tell(self, batch: Batch) -> None:
        """Tell layers that treat rows differently which rows these are."""
        draw_masks(self._dropout, self.seed, self.step, batch.place)
        for norm in self._batch_norm:
            norm.real_rows = batch.rows

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """All that the dense optimizer trains: the tower's and, by `embedding.others`, the tables' learned rows."""
        tables = growing(self.tables)
        return {**dict(self.tower.named_parameters()), **(tables.dense_parameters() if tables else {})}


def build_tower(config: Config, schema: Schema) -> Tower:
    """The tower that `model` describes, over the schema's fields, with numeric ones embedded as `numeric` says.

    Raises:
        ConfigError: no such class, or a key that its constructor does not take, or one that it misses.
    """

    def embed_numeric(fields: int, dim: int) -> nn.Module:
        return instantiate(config.numeric, "numeric", fields, dim)

    fields = Fields(tuple(schema.numeric_names), tuple(schema.id_names), embed_numeric)
    tower = instantiate(config.model, "model", fields)
    if fields.numeric and isinstance(embed_numeric(len(fields.numeric), 1), Raw):
        _check_raw(tower, fields, config)
    return tower


def _check_raw(tower: Tower, fields: Fields, config: Config) -> None:
    """Raise ConfigError where a tower has no use for values that are no vectors."""
    numeric = torch.ones(4, len(fields.numeric), requires_grad=True)
    embeddings = {group: torch.ones(4, len(fields.ids), dim) for group, dim in tower.embedding_dims.items()}
    logits = tower.eval()(numeric, embeddings)
    tower.train()
    if not logits.requires_grad or torch.autograd.grad(logits.sum(), numeric, allow_unused=True)[0] is None:
        raise ConfigError(
            f"numeric.target is {config.numeric['target']}, but {config.model['target']} never reads numbers "
            f"without a vector ({fields.numeric[0]!r} and all others would be dropped); set another numeric=, as scaled"
        )


def build_tables(config: Config, schema: Schema, tower: Tower) -> Tables:
    """The tables that the tower wants, static or dynamic as `embedding.kind` says.

    Raises:
        ConfigError: unknown kind, or a key that this kind cannot serve.
    """
    embedding, sparse = config.embedding, config.optimizer.sparse
    optimizer = RowOptimizer(
        sparse.name,
        lr=sparse.lr,
        eps=sparse.eps,
        beta1=sparse.beta1,
        beta2=sparse.beta2,
        weight_decay=sparse.weight_decay,
        initial_accumulator=sparse.initial_accumulator,
        beta=sparse.beta,
        l1=sparse.l1,
        l2=sparse.l2,
        state_format=sparse.state_format,
        old_rows_factor=sparse.old_rows_factor,
    )
    # A bag of at most one id needs no average.
    averaged = [f.name for f in schema.categorical if f.kind in ("ids", "sequence") and f.pooling == "mean"]
    if not schema.id_names and embedding.kind in ("static", "dynamic"):
        return NoTables(tower.embedding_dims)
    if embedding.kind == "static":
        groups = {
            group: [
                TableConfig(f"{table}_{group}", dim, tuple(features), embedding.init_std)
                for table, features in schema.tables.items()
            ]
            for group, dim in tower.embedding_dims.items()
        }
        seed = config.trainer.seed
        bags = [feature.name for feature in schema.categorical if feature.kind in ("ids", "sequence")]
        if embedding.l2 and bags:
            raise ConfigError(
                f"embedding.l2 is {embedding.l2}, which decays each row of a bag, and static tables give sums of bags "
                f"alone (feature {bags[0]!r}); set embedding=dynamic or embedding.l2=0"
            )
        return StaticTables(groups, schema.id_names, embedding.rows, optimizer, seed, schema.weighted, averaged)
    if embedding.kind == "dynamic":
        _check_exceptions(embedding.formats or {}, tower, schema)
        _check_names(schema)
        tables = [_dynamic_table(config, tower, optimizer, t, tuple(f)) for t, f in schema.tables.items()]
        if embedding.alpt.every is not None and not any(table.learns_steps for table in tables):
            raise ConfigError(
                f"embedding.alpt.every is {embedding.alpt.every}, but no group has a step size to learn; "
                "set embedding.format or formats to int8, int4 or int2, or alpt.every to null"
            )
        return DynamicTables(
            tables,
            schema.id_names,
            embedding.rows,
            averaged,
            embedding.transport,
            embedding.others,
            bag_tables=[t.name for t in tables if _on_bag_path(config, schema, t)],
            first_values=embedding.first_values,
            timeout_seconds=config.trainer.timeout_seconds,
            squares=embedding.l2 > 0,
        )
    raise ConfigError(f"embedding.kind is {embedding.kind!r}; expected dynamic or static")


def _dynamic_table(
    config: Config, tower: Tower, optimizer: RowOptimizer, name: str, features: tuple[str, ...]
) -> DynamicTableConfig:
    embedding = config.embedding
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    table = DynamicTableConfig(
        name=name,
        features=features,
        groups=tuple(_group(config, name, group, dim) for group, dim in tower.embedding_dims.items()),
        optimizer=optimizer,
        seed=config.trainer.seed,
        admission=Admission(**vars(embedding.admission)),
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


def _on_bag_path(config: Config, schema: Schema, table: DynamicTableConfig) -> bool:
    """As embedding.bag_path says; `auto` counts with the longest bags that the schema allows, if it has a limit."""
    if config.embedding.bag_path != "auto":
        return config.embedding.bag_path == "always"
    features = [f for f in schema.categorical if f.name in table.features]
    lengths = [f.max_length if f.kind in ("ids", "sequence") else 1 for f in features]
    if None in lengths:
        return False
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rows = -(-config.trainer.batch_size // ranks)
    bags, ids = rows * len(lengths), rows * sum(lengths)
    return sums_are_smaller(bags, ids, config.embedding.rows, table.width, ranks, schema.weighted)


def _group(config: Config, table: str, name: str, dim: int) -> Group:
    """One group of a table in the format that embedding.formats or, where that makes it smaller, format says."""
    embedding = config.embedding
    exceptions = embedding.formats or {}
    format = next((exceptions[key] for key in (f"{table}.{name}", table, name) if key in exceptions), None)
    if format is None:
        # A row of few values would not become smaller: it has a step size beside them and fills whole words.
        smaller = packed_layout(embedding.format, dim, "sgd").bytes < 4 * dim
        format = embedding.format if smaller else "fp32"
    if not is_int(format):
        return Group(name, dim, embedding.init_std, format, embedding.rounding)
    step = embedding.step or step_of_range(format, embedding.range)
    learned, alpt = None, embedding.alpt
    if alpt.every is not None:
        shared = {"batch": config.trainer.batch_size * dim, "dim": dim, "none": 0}[alpt.gradient_scale]
        scale = (shared * code_range(format)[1]) ** -0.5 if shared else 1.0
        learned = StepOptimizer(alpt.lr, alpt.weight_decay, scale)
    return Group(name, dim, embedding.init_std, format, embedding.rounding, step, learned)


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


def _check_exceptions(formats: dict[str, str], tower: Tower, schema: Schema) -> None:
    groups, tables = list(tower.embedding_dims), list(schema.tables)
    known = [*groups, *tables, *(f"{table}.{group}" for table in tables for group in groups)]
    for key in formats:
        if key not in known:
            hint = did_you_mean(key, known, f"groups are {', '.join(groups)}")
            raise ConfigError(f"embedding.formats.{key} names no table and no group{hint}")
