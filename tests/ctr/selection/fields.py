"""A batch with fields of every kind, and look-ups of it without tables."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tessera.ctr.data.batch import Batch
from tessera.ctr.data.schema import Schema
from tessera.ctr.models.tower import Fields, Tower
from tessera.ctr.network import Network, _sequence_group
from tessera.distributed.sequences import events_key

FEATURES = [
    {"name": "x", "kind": "numeric", "indicator": True},
    {"name": "y", "kind": "numeric"},
    {"name": "a"},
    {"name": "item", "table": "items"},
    {"name": "bag", "kind": "ids"},
]
SEQUENCES = [
    {"name": "seen", "kind": "sequence", "pooling": "none", "max_length": 4, "align": "seen", "table": "items"},
    {"name": "price", "kind": "sequence", "dtype": "float", "pooling": "none", "max_length": 4, "align": "seen"},
]
ROWS, REAL = 7, 6


def schema_with(sequences: bool) -> Schema:
    return Schema.from_config({"features": FEATURES + SEQUENCES * sequences})


def fields_with(schema: Schema, embed_numeric) -> Fields:
    groups = tuple(_sequence_group(schema, name) for name in schema.sequences)
    vectors = {one.name: one.length for one in schema.vectors}
    names = tuple(schema.scalar_names), tuple(schema.pooled_names)
    return Fields(*names, embed_numeric, sequences=groups, vectors=vectors)


def batch_of(schema: Schema, seed: int = 0) -> Batch:
    drawn = torch.Generator().manual_seed(seed)
    lengths = {name: torch.ones(ROWS, dtype=torch.int32) for name in schema.id_names}
    for name in {"bag", "seen"} & set(schema.id_names):
        lengths[name] = torch.randint(0, 4, (ROWS,), generator=drawn, dtype=torch.int32)
    for one in lengths.values():
        one[REAL:] = 0
    all_lengths = torch.cat([lengths[name] for name in schema.id_names])
    values = torch.randint(0, 50, (int(all_lengths.sum()),), generator=drawn)
    real = torch.arange(ROWS) < REAL
    events = int(lengths["seen"].sum()) if "seen" in lengths else 0
    return Batch(
        numeric=torch.rand(ROWS, len(schema.numeric_names), generator=drawn, dtype=torch.float64) * real[:, None],
        ids=KeyedJaggedTensor(keys=schema.id_names, values=values, lengths=all_lengths, stride=ROWS),
        labels=(torch.rand(ROWS, 1, generator=drawn) < 0.5).double() * real[:, None],
        weight=real.double(),
        group=None,
        time=None,
        rows=REAL,
        numbers={"price": torch.rand(events, generator=drawn, dtype=torch.float64)} if events else {},
    )


class NoTables(torch.nn.Module):
    """Vectors that are functions of the id, in float64."""

    def __init__(self, schema: Schema, dims: dict[str, int]) -> None:
        super().__init__()
        self.schema, self.dims = schema, dims

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for place, (group, dim) in enumerate(self.dims.items()):
            pooled = []
            for name in self.schema.id_names:
                one = ids[name]
                steps = torch.arange(1, dim + 1, dtype=torch.float64) + place
                vectors = torch.sin(one.values()[:, None].double() * steps)
                if self.schema.pooling[name] == "none":
                    found[events_key(group, name)] = vectors
                    continue
                bags = torch.repeat_interleave(torch.arange(ROWS), one.lengths().long())
                pooled.append(torch.zeros(ROWS, dim, dtype=torch.float64).index_add(0, bags, vectors))
            found[group] = torch.stack(pooled, 1)
        return found


def network_of(tower: Tower, schema: Schema, fields: Fields) -> Network:
    return Network(NoTables(schema, tower.embedding_dims), tower.double().eval(), fields, amp=False)
