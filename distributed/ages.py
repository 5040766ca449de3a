"""Carry ages, the seconds between a row's last event and the time of its batch, to the owners of table rows.

A batch may hold events of many days, and a row is touched with the time of its own: the latest event of the batch that
has the row's id. On the row path an id travels once, and its age travels with its count as one float64, which holds
whole numbers of 53 bits exactly; without times only the count does, as float32. With the pooled output dist ids travel
as often as they occur and have no count; there ranks tell each other the ages of their rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from tessera.distributed.collectives import gather

COUNT_BITS, AGE_BITS = 24, 29
MAX_COUNT, MAX_AGE = (1 << COUNT_BITS) - 1, (1 << AGE_BITS) - 1  # 17 years: what is older counts as so old


def ages_at(now: int, times: Tensor) -> Tensor:
    """Return how long before `now` the events were, in seconds: int64 [B], 0 for later events. times: int64 [B]."""
    return (now - times).clamp_(0, MAX_AGE)


def ages_of_values(ids: KeyedJaggedTensor, ages: Tensor) -> Tensor:
    """Return the age of each id's row: int64 [values], for ages int64 [B] of the rows."""
    values, lengths = ids.values(), ids.lengths()
    if lengths.device.type == "cpu" and values.numel() == lengths.numel() and bool((lengths == 1).all()):
        return ages.repeat(len(ids.keys()))  # one id per row everywhere: the most frequent case, and cheaper
    rows = torch.arange(lengths.numel(), device=values.device).remainder_(max(1, ids.stride()))
    return ages[rows.repeat_interleave(lengths, output_size=values.numel())]


def least(ages: Tensor, places: Tensor, count: int) -> Tensor:
    """Return the smallest age (int64 [n]) that belongs to each of `count` places: int64 [count]. places: int64 [n]."""
    return ages.new_full((count,), MAX_AGE).scatter_reduce_(0, places, ages, "amin")


def packed(counts: Tensor, ages: Tensor | None) -> Tensor:
    """Pack counts and ages (int64 [n]) into the weights that travel with ids: float64 [n]; float32 [n] without ages."""
    if ages is None:
        return counts.float()  # exact up to 2^24 of one id in one batch
    return ((ages << COUNT_BITS) | counts.clamp(max=MAX_COUNT)).double()


def unpacked(weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the counts and the ages (int64 [n] each; ages may be None) that `packed` was given."""
    whole = weights.long()
    if weights.dtype != torch.float64:
        return whole, None
    return whole & MAX_COUNT, whole >> COUNT_BITS


def ages_of_ranks(ages: Tensor) -> Tensor:
    """Return the ages of all ranks' rows in the order of ranks: int64 [ranks * B]. Collective; every rank must have the
    same number of rows."""
    return gather(ages).flatten()
