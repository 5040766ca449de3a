"""Batches of one size for what scores: rows without ids are added, or there are no others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tessera.ctr.data.batch import Batch
from tessera.ctr.data.schema import Schema


def padded(batch: Batch, size: int) -> Batch:
    """Return the batch with so many rows, those added without ids: ranks look up batches of one size."""
    more = size - batch.numeric.shape[0]
    if not more:
        return batch
    ids = batch.ids
    lengths = ids.lengths().view(len(ids.keys()), -1)
    more_bags = KeyedJaggedTensor(
        keys=ids.keys(),
        values=ids.values(),
        weights=ids.weights_or_none(),
        lengths=F.pad(lengths, (0, more)).flatten(),
        stride=size,
    )
    return replace(
        batch,
        numeric=F.pad(batch.numeric, (0, 0, 0, more)),
        ids=more_bags,
        labels=F.pad(batch.labels, (0, 0, 0, more)),
        weight=F.pad(batch.weight, (0, more)),
        place=None,
        number=None,
        known=None,
    )


def empty(schema: Schema, size: int) -> Batch:
    """Return a batch without rows or ids."""
    keys = schema.id_names
    return Batch(
        numeric=torch.zeros(size, len(schema.numeric_names)),
        ids=KeyedJaggedTensor(
            keys=keys,
            values=torch.zeros(0, dtype=torch.int64),
            weights=torch.zeros(0) if schema.weighted else None,
            lengths=torch.zeros(len(keys) * size, dtype=torch.int32),
            stride=size,
        ),
        labels=torch.zeros(size, len(schema.labels)),
        weight=torch.zeros(size),
        group=None,
        time=None,
        rows=0,
        numbers={feature.name: torch.zeros(0) for feature in schema.number_sequences},
    )
