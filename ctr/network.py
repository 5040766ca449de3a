"""Build the whole model from a configuration: sharded tables below, the tower on top."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.schema import Schema, length_of
from tessera.ctr.instantiate import class_of, instantiate
from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.calibration import attach_calibration
from tessera.ctr.models.dropout import draw_masks, dropout_layers
from tessera.ctr.models.numeric import Raw
from tessera.ctr.models.tower import Events, Fields, SequenceGroup, Tower, drawn_inputs, logits_of
from tessera.ctr.selection.gate_methods import make_gates
from tessera.ctr.selection.gates import FieldGates, attach, gates_of
from tessera.ctr.tables import build_tables
from tessera.distributed.rank import Process
from tessera.distributed.sequences import events_key
from tessera.distributed.sharding import shard
from tessera.distributed.tables import Tables, as_dynamic
from tessera.embedding.errors import ConfigError


class Network(nn.Module):
    """Tables -> tower -> logits. With `amp` the tower runs in bfloat16; tables and logits stay float32.

    Attributes:
        step: number of the training step, by which dropout draws its masks; set before the forward pass.
    """

    def __init__(self, tables: Tables, tower: Tower, fields: Fields, *, amp: bool, seed: int = 0) -> None:
        super().__init__()
        self.tables = tables
        self.tower = tower
        self.id_names, self._sequences = fields.ids, fields.sequences
        self.amp = amp
        self.seed, self.step = seed, 0
        self._dropout = dropout_layers(tower)
        self._towers = [module for module in tower.modules() if isinstance(module, Tower)]
        self._batch_norm = [module for module in tower.modules() if isinstance(module, BatchNorm)]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits, [B] or of several labels [B, T], and what was looked up: group -> [B, pooled id fields, dim],
        and the rows of sequences by `events_key`, [events, dim]; all float32."""
        if self.training:
            self._tell(batch)
        embeddings = self.tables(batch.ids)
        with torch.autocast(batch.numeric.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.of_tower(batch, embeddings)
        return logits.float(), embeddings

    def of_tower(self, batch: Batch, embeddings: dict[str, Tensor]) -> Tensor:
        """Return the tower's logits, of what was looked up for the batch."""
        if not self._sequences:
            return self.tower(batch.numeric, embeddings)
        groups = self.tower.embedding_dims
        pooled = {group: embeddings[group] for group in groups}
        events = {}
        for one in self._sequences:
            of = {group: {name: embeddings[events_key(group, name)] for name in one.ids} for group in groups}
            lengths = batch.ids[one.ids[0]].lengths().long()
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            events[one.name] = Events(offsets, of, {name: batch.numbers[name] for name in one.numbers})
        return self.tower(batch.numeric, pooled, events)

    def _tell(self, batch: Batch) -> None:
        """Tell layers that treat rows differently which rows these are."""
        draw_masks(self._dropout, self.seed, self.step, batch.place)
        for tower in self._towers:
            tower.begin_step(self.step)
        gates = self.field_gates
        if gates:
            gates.begin_step(self.seed, self.step, batch.place)
        for norm in self._batch_norm:
            norm.real_rows = None if norm.of_events else batch.rows

    @property
    def field_gates(self) -> FieldGates | None:
        """The gates that the tower reads its fields through, if it has any."""
        return gates_of(self.tower)

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Return all that the dense optimizer trains: the tower's parameters and, by `embedding.oov`, the tables'
        OOV rows."""
        tables = as_dynamic(self.tables)
        return {**dict(self.tower.named_parameters()), **(tables.dense_parameters() if tables else {})}


def build_model(config: Config, schema: Schema, process: Process) -> tuple[DistributedModelParallel, str]:
    """Return the sharded model, with the same initial values on any number of ranks, and its plan as text.

    Raises:
        ConfigError: a key of model, numeric or embedding that cannot be, or tables that do not fit the memory.
    """
    tower, trainer = build_tower(config, schema), config.trainer
    if trainer.compile and tower.reads_sequences:
        raise ConfigError(
            f"trainer.compile is true, and {config.model['target']} sees events, whose number differs from batch to "
            "batch: each would be compiled anew; set trainer.compile=false"
        )
    if trainer.compile:
        tower.compile(mode=compiler_mode(config, process.device))
    tables = build_tables(config, schema, tower, process.world_size)
    network = Network(tables, tower, fields_of(config, schema), amp=trainer.amp, seed=trainer.seed)
    return shard(network, network.tables, process, -(-trainer.batch_size // process.world_size))


def compiler_mode(config: Config, device: torch.device) -> str | None:
    """Return the mode of torch.compile. Its CUDA graphs are recorded for each size of batch, the short last ones of an
    epoch too."""
    return "reduce-overhead" if config.trainer.cuda_graphs and device.type == "cuda" else None


def build_tower(config: Config, schema: Schema) -> Tower:
    """Return the tower that `model` describes, over the schema's fields, with numeric ones embedded as `numeric` says.

    Raises:
        ConfigError: no such class, or a key that its constructor does not take, or one that it misses, or a model of
            one label for several.
    """
    fields = fields_of(config, schema)
    tower = instantiate(config.model, "model", fields)
    if len(fields.labels) > 1 and not tower.has_heads:
        raise ConfigError(
            f"model.target is {config.model['target']}, which answers one label, and data.schema.labels has "
            f"{', '.join(one.name for one in fields.labels)}; expected one label, or a model such as shared_bottom"
        )
    if fields.sequences and not tower.reads_sequences:
        raise ConfigError(
            f"model.target is {config.model['target']}, which reads no sequence event by event (feature "
            f"{fields.sequences[0].ids[0]!r} has pooling: none); set a model that does, as din, or pooling: mean"
        )
    if fields.columns and isinstance(fields.embed_numeric(fields.columns, 1), Raw):
        _check_raw(tower, fields, config)
    gates = make_gates(config.selection, schema, fields, tower.embedding_dims)
    if gates:
        attach(gates, tower, fields, class_of(config.numeric))
    if config.trainer.calibration != "none":
        attach_calibration(tower, config.trainer.calibration, len(fields.labels))
    return tower


def fields_of(config: Config, schema: Schema) -> Fields:
    """Return the fields that a tower sees."""

    def embed_numeric(fields: int, dim: int) -> nn.Module:
        return instantiate(config.numeric, "numeric", fields, dim)

    sequences = tuple(_sequence_group(schema, name) for name in schema.sequences)
    vectors = {feature.name: length_of(feature) for feature in schema.vectors}
    labels, numeric = schema.tasks, tuple(schema.scalar_names)
    crosses = tuple((one.name, one.of[0], one.of[1]) for one in schema.crosses)
    ids = tuple(schema.pooled_names)
    return Fields(numeric, ids, embed_numeric, labels, len(labels), sequences, vectors, crosses)


def _sequence_group(schema: Schema, name: str) -> SequenceGroup:
    group = schema.sequences[name]
    ids = tuple(feature.name for feature in group if feature.name in schema.id_names)
    numbers = tuple(feature.name for feature in group if feature.name not in schema.id_names)
    of_table = {feature: table for table, features in schema.tables.items() for feature in features}
    targets = [
        next((place for place, own in enumerate(schema.pooled_names) if of_table[own] == of_table[one]), None)
        for one in ids
    ]
    length = group[0].max_length
    assert length is not None  # the schema refuses sequences without
    return SequenceGroup(name, ids, numbers, tuple(targets), length)


def _check_raw(tower: Tower, fields: Fields, config: Config) -> None:
    """Raise ConfigError where a tower has no use for values that are no vectors."""
    numeric, embeddings, events = drawn_inputs(tower, fields, 4, length=1)
    logits = logits_of(tower.eval(), numeric, embeddings, events)
    tower.train()
    first = [*fields.numeric, *fields.vectors][0]
    if not logits.requires_grad or torch.autograd.grad(logits.sum(), numeric, allow_unused=True)[0] is None:
        raise ConfigError(
            f"numeric.target is {config.numeric['target']}, but {config.model['target']} never reads numbers "
            f"without a vector ({first!r} and all others would be dropped); set another numeric=, as scaled"
        )
