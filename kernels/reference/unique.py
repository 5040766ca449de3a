"""Find distinct ids in torch: sort, then order the distinct ones by their first position."""

from __future__ import annotations

import torch
from torch import Tensor


def unique_inverse(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ordered, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    positions = torch.arange(ids.numel(), device=ids.device)
    first = torch.full_like(ordered, ids.numel()).scatter_reduce_(0, inverse, positions, "amin")
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=ids.device)
    return ordered[order], rank[inverse], counts[order]


def unique_tables(ids: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = bounds.diff()
    if int(bounds[0]) != 0 or int(bounds[-1]) != ids.numel() or bool((lengths < 0).any()):
        raise ValueError(f"bounds: expected ascending from 0 to {ids.numel()}")
    tables = torch.arange(lengths.numel(), device=ids.device).repeat_interleave(lengths)
    # Numbers that stand for an id, whatever its table, are few enough to have the table in their upper bits.
    number = torch.unique(ids, return_inverse=True)[1]
    inverse, counts = unique_inverse(number + tables * max(1, ids.numel()))[1:]
    first = torch.full_like(counts, ids.numel()).scatter_reduce_(
        0, inverse, torch.arange(ids.numel(), device=ids.device), "amin"
    )
    of_table = torch.bincount(tables[first], minlength=lengths.numel())
    return ids[first], inverse, counts, torch.cat([of_table.new_zeros(1), of_table.cumsum(0)])


def positions_of(inverse: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    if inverse.numel() and not 0 <= int(inverse.min()) <= int(inverse.max()) < counts.numel():
        raise IndexError(
            f"inverse: expected below {counts.numel()}, found {int(inverse.min())} to {int(inverse.max())}"
        )
    return inverse.argsort(stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
