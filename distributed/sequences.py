"""Rows of sequences, which reach the tower one by one, beside pooled ones of the same look-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from tessera.kernels.pool import pool

#: Sums over bags by group, [B, pooled fields, dim], and the rows of sequences, [ids, dim] by `events_key`.
PooledAndKept: TypeAlias = tuple[Sequence[Tensor], dict[str, Tensor]]


def events_key(group: str, name: str) -> str:
    """Return the key of a sequence's rows of a group, in what the tables return."""
    return f"{group}/{name}"


def pool_or_keep(
    rows: Tensor, index: Tensor, ids: KeyedJaggedTensor, is_sequence: Sequence[bool], groups: Mapping[str, int]
) -> PooledAndKept:
    """Return weighted sums over bags by group, [B, pooled fields, dim], and `events_key(group, name)` -> the row of
    each id of a sequence, [its ids, dim].

    rows: [distinct, width]; index: int64 [values of ids]; is_sequence: of each key; groups: name -> columns.

    An id of a sequence is a bag of its own in one call of `pool` for all keys. So the gradients of a row are summed in
    the order of its places in the batch, wherever they come from: a tower that averages its sequences itself trains
    rows to the same bits as pooling does.
    """
    names, stride, offsets = ids.keys(), ids.stride(), ids.offsets().long()
    widths = list(groups.values())
    if not any(is_sequence):
        return pool(rows, index, offsets, ids.weights_or_none(), len(names), widths), {}
    ends = ids.offset_per_key()
    device = offsets.device
    bounds, sizes = [offsets[:1]], []
    for key, one_by_one in enumerate(is_sequence):
        if one_by_one:
            bounds.append(torch.arange(ends[key] + 1, ends[key + 1] + 1, device=device))
        else:
            bounds.append(offsets[key * stride + 1 : (key + 1) * stride + 1])
        sizes.append(ends[key + 1] - ends[key] if one_by_one else stride)
    first = [0, *accumulate(sizes)]
    # A row's columns are cut into groups here and not by `pool`, whose groups lie side by side for [B, keys, width].
    (sums,) = pool(rows, index, torch.cat(bounds), ids.weights_or_none())
    of_keys = [sums[first[key] : first[key + 1], 0] for key in range(len(names))]
    pooled = [one for one, one_by_one in zip(of_keys, is_sequence, strict=True) if not one_by_one]
    stacked = torch.stack(pooled, 1) if pooled else rows.new_zeros(stride, 0, sum(widths))
    events = {
        events_key(group, names[key]): part
        for key, one_by_one in enumerate(is_sequence)
        if one_by_one
        for group, part in zip(groups, of_keys[key].split(widths, 1), strict=True)
    }
    return list(stacked.split(widths, 2)), events
