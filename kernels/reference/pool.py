"""Sums over bags in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    inside, bags = _positions(index, offsets, values.shape[0])
    rows = values[index[inside]]
    if weights is not None:
        rows = rows * weights[inside, None]
    return values.new_zeros(offsets.numel() - 1, values.shape[1]).index_add_(0, bags, rows)


def pool_backward(grads: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    inside, bags = _positions(index, offsets, rows)
    of_positions = grads[bags]
    if weights is not None:
        of_positions = of_positions * weights[inside, None]
    return grads.new_zeros(rows, grads.shape[1]).index_add_(0, index[inside], of_positions)


def _positions(index: Tensor, offsets: Tensor, rows: int) -> tuple[slice, Tensor]:
    """The positions that lie in bags, and the bag of each."""
    lengths = offsets.diff()
    if bool((lengths < 0).any()) or int(offsets[0]) < 0 or int(offsets[-1]) > index.numel():
        raise IndexError(f"offsets must not decrease and must stay inside the {index.numel()} positions")
    inside = slice(int(offsets[0]), int(offsets[-1]))
    used = index[inside]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= rows):
        raise IndexError(f"index: expected below {rows}, found {int(used.min())} to {int(used.max())}")
    return inside, torch.arange(lengths.numel(), device=index.device).repeat_interleave(lengths)
