"""Find the latest of the times at which a batch has each of its distinct ids."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_index
from tessera.kernels.reference import latest as reference


def latest_of_bags(times: Tensor, offsets: Tensor, places: Tensor, count: int, none: int) -> Tensor:
    """Return for each of `count` places the latest time of the bags that name it: int64 [count], at least `none`.

    times: int64 [B], of the rows of a batch; offsets: int64 [keys * B + 1], from 0 to n, not decreasing: bag b of key k
    is positions offsets[k B + b] to offsets[k B + b + 1] of `places`, and has the time of row b; places: int64 [n],
    0 <= place < count. Raises ValueError for wrong dtypes or shapes, IndexError for an offset or place out of range.
    """
    for name, given in (("times", times), ("offsets", offsets), ("places", places)):
        check_index(name, given)
    batch, bags = times.numel(), offsets.numel() - 1
    if bags < 0 or bags and (batch == 0 or bags % batch):
        raise ValueError(f"offsets: expected int64 [keys * {batch} + 1], found {bags + 1} numbers")
    ops = backend.ops_for(times) or reference
    found: Tensor = ops.latest_of_bags(times, offsets, places, count, none)
    return found


@torch.library.register_fake("tessera::latest_of_bags")
def _latest_of_bags_fake(times: Tensor, offsets: Tensor, places: Tensor, count: int, none: int) -> Tensor:
    return times.new_empty(count)
