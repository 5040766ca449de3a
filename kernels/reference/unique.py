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
