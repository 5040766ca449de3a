"""Find distinct ids in order of first occurrence: one stable sort and prefix sums."""

from __future__ import annotations

import torch
from torch import Tensor


def unique_inverse(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if ids.numel() == 0:
        return ids.clone(), torch.empty_like(ids), torch.empty_like(ids)
    ordered, order = torch.sort(ids, stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=begins[1:])
    starts = begins.nonzero().flatten()  # the one place where the host waits
    # The sort is stable: an id's first position in sorted order is its first in the batch.
    first = order[starts]
    is_first = torch.zeros_like(begins).index_fill_(0, first, value=True)
    rank = is_first.cumsum(0).sub_(1)[first]  # by value; as many as there are distinct ids
    inverse = torch.empty_like(order)
    inverse[order] = rank[begins.cumsum(0).sub_(1)]
    counts = torch.empty_like(rank)
    counts[rank] = torch.diff(starts, append=starts.new_full((1,), ids.numel()))
    unique = torch.empty_like(rank)
    unique[rank] = ordered[starts]
    return unique, inverse, counts
