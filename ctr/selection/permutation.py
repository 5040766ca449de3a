"""Permute a field inside a batch: rows get the field's values of other rows, and keep all else.

A bag is permuted as what was looked up for it, so that a batch is looked up once for all fields: the vector of a bag
does not depend on the row it stands in.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tessera.ctr.data.batch import Batch
from tessera.ctr.data.counter_random import bits, key
from tessera.ctr.data.schema import Schema, length_of
from tessera.ctr.selection.field_groups import FieldGroup, field_names
from tessera.embedding.config import key_of

PERMUTATION = key_of("permutation")


def row_order(rows: int, padded: int, seed: int, name: str, *numbers: int) -> Tensor:
    """Return int64 [padded], whose row each row's value comes from: the first `rows` permuted, the padding as it is.

    It is a function of the arguments alone. numbers: of the repeat, the batch and the rank, say.
    """
    drawn = bits(key(seed, PERMUTATION, key_of(name), *numbers), np.arange(rows, dtype=np.uint64))
    order = np.arange(padded)
    order[:rows] = np.argsort(drawn, kind="stable")
    return torch.from_numpy(order)


def permuted(
    schema: Schema, group: FieldGroup, batch: Batch, embeddings: dict[str, Tensor], order: Tensor
) -> tuple[Batch, dict[str, Tensor]]:
    """Return a batch, and what was looked up for it, with all fields of the group in another order of rows.

    Args:
        embeddings: as `Network.forward` returns them: group of embeddings -> [B, pooled id fields, dim], and the rows
            of sequences.
        order: int64 [B], as `row_order`.
    """
    names, pooled = field_names(schema), len(schema.pooled_names)
    numeric = len(schema.scalar_names) + len(schema.vectors)
    order = order.to(batch.numeric.device)
    columns = _numeric_columns(schema, group)
    places = [at - numeric for at in group.fields if numeric <= at < numeric + pooled]
    unpooled = [names[at] for at in group.fields if at >= numeric + pooled]
    found = dict(embeddings)
    if columns:
        batch = replace(batch, numeric=_columns_in_order(batch.numeric, columns, order))
    if places:
        for name, vectors in embeddings.items():
            if "/" not in name:
                found[name] = _columns_in_order(vectors, places, order)
    for one in unpooled:
        batch, found = _events_in_order(schema, one, batch, found, order)
    return batch, found


def _numeric_columns(schema: Schema, group: FieldGroup) -> list[int]:
    """Return the columns of `Batch.numeric` that are the group's."""
    scalars = len(schema.scalar_names)
    columns, first = [at for at in group.fields if at < scalars], scalars
    for number, feature in enumerate(schema.vectors, scalars):
        columns += range(first, first + length_of(feature)) if number in group.fields else ()
        first += length_of(feature)
    return columns


def _columns_in_order(values: Tensor, columns: list[int], order: Tensor) -> Tensor:
    """Return [B, n, ..] with some of its columns taken from other rows."""
    changed = values.clone()
    changed[:, columns] = values[:, columns][order]
    return changed


def _events_in_order(
    schema: Schema, name: str, batch: Batch, embeddings: dict[str, Tensor], order: Tensor
) -> tuple[Batch, dict[str, Tensor]]:
    """Permute one sequence: its bag in `batch.ids`, which says the length, and the rows that were looked up for it, or
    its numbers, which have the length of the ids that they are aligned with."""
    if name in batch.numbers:
        (group,) = (one for one in schema.sequences.values() if name in [feature.name for feature in one])
        ids = next(feature.name for feature in group if feature.name in schema.id_names)
        # Its ids come first among the fields of the group, so they are in the new order already.
        index = _events_of(batch.ids[ids].lengths()[torch.argsort(order)], order)
        return replace(batch, numbers={**batch.numbers, name: batch.numbers[name][index]}), embeddings
    index = _events_of(batch.ids[name].lengths(), order)
    changed = {key: rows[index] if key.partition("/")[2] == name else rows for key, rows in embeddings.items()}
    return replace(batch, ids=with_bags(batch.ids, name, order)), changed


def with_bags(ids: KeyedJaggedTensor, name: str, order: Tensor) -> KeyedJaggedTensor:
    """Return the same ids, with the bags of one key in another order. order: int64 [B]."""
    keys, rows = ids.keys(), ids.stride()
    lengths = ids.lengths().long()
    bags = torch.arange(len(lengths), device=lengths.device)
    first = keys.index(name) * rows
    bags[first : first + rows] = first + order
    index = _events_of(lengths, bags)
    weights = ids.weights_or_none()
    return KeyedJaggedTensor(
        keys=keys,
        values=ids.values()[index],
        weights=None if weights is None else weights[index],
        lengths=ids.lengths()[bags],
        stride=rows,
    )


def _events_of(lengths: Tensor, order: Tensor) -> Tensor:
    """Return the places of the values of bags in this order, int64 [values]."""
    lengths = lengths.long()
    first = (lengths.cumsum(0) - lengths)[order]
    wanted = lengths[order]
    ends = wanted.cumsum(0)
    index = torch.arange(int(lengths.sum()), device=lengths.device)
    return index + torch.repeat_interleave(first - (ends - wanted), wanted)
