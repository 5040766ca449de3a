"""Carry the times of events to the owners of table rows, and find how old they are.

A batch may hold events of many days, and a row is touched with the time of its own: the latest event of the batch that
has the row's id. The owner limits it by the time of the batch, which it knows only when the ids of all ranks are there.
On the row path an id travels once, and its time travels with its count as one int64; without times only the count does,
as int32. With the pooled output dist ids travel as often as they occur, each with the time of its row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

COUNT_BITS, TIME_BITS = 24, 40
MAX_COUNT = (1 << COUNT_BITS) - 1
MAX_AGE = (1 << 29) - 1  # 17 years: what is older counts as so old
MAX_TIME, MIN_TIME = (1 << TIME_BITS - 1) - 1, -(1 << TIME_BITS - 1)  # 17,000 years from 1970


def ages_at(now: int, times: Tensor) -> Tensor:
    """Return how long before `now` the events were, in seconds: int64 [B], 0 for later events. times: int64 [B]."""
    return (now - times).clamp_(0, MAX_AGE)


def times_of_values(ids: KeyedJaggedTensor, times: Tensor) -> Tensor:
    """Return the time of each id's row: int64 [values], for times int64 [B] of the rows."""
    values, lengths = ids.values(), ids.lengths()
    if lengths.device.type == "cpu" and values.numel() == lengths.numel() and bool((lengths == 1).all()):
        return times.repeat(len(ids.keys()))  # one id per row everywhere: the most frequent case, and cheaper
    rows = torch.arange(lengths.numel(), device=values.device).remainder_(max(1, ids.stride()))
    return times[rows.repeat_interleave(lengths, output_size=values.numel())]


def latest(times: Tensor, places: Tensor, count: int) -> Tensor:
    """Return the latest time (int64 [n]) that belongs to each of `count` places: int64 [count]. places: int64 [n]."""
    return times.new_full((count,), MIN_TIME).scatter_reduce_(0, places, times, "amax")


def packed(counts: Tensor, times: Tensor | None) -> Tensor:
    """Pack counts and times (int64 [n]) into what travels with ids: int64 [n]; int32 [n] without times."""
    if times is None:
        return counts.int()
    return (times.clamp(MIN_TIME, MAX_TIME) << COUNT_BITS) | counts.clamp(max=MAX_COUNT)


def unpacked(words: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the counts and the times (int64 [n] each; without times int32 [n] and None) that `packed` was given."""
    if words.dtype != torch.int64:
        return words, None
    return words & MAX_COUNT, words >> COUNT_BITS
