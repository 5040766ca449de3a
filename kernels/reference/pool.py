"""Sum over bags in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pool(
    values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, keys: int, widths: Sequence[int]
) -> list[Tensor]:
    inside, bags = _positions(index, offsets, values.shape[0])
    rows = values[index[inside]]
    if weights is not None:
        rows = rows * weights[inside, None]
    sums = values.new_zeros(offsets.numel() - 1, values.shape[1]).index_add_(0, bags, rows)
    return columns_of_groups(sums, keys, widths)


def pool_backward(grads: Sequence[Tensor], index: Tensor, offsets: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    inside, bags = _positions(index, offsets, rows)
    grads_kbw = torch.cat(list(grads), 2).transpose(0, 1)
    of_positions = grads_kbw.flatten(0, 1)[bags]
    if weights is not None:
        of_positions = of_positions * weights[inside, None]
    return grads_kbw.new_zeros(rows, grads_kbw.shape[2]).index_add_(0, index[inside], of_positions)


def columns_of_groups(sums: Tensor, keys: int, widths: Sequence[int]) -> list[Tensor]:
    """Split [keys * B, w] into one [B, keys, width] per group; the groups' columns lie one after the other."""
    groups = sums.view(keys, len(sums) // keys, sums.shape[1]).transpose(0, 1).split(list(widths), 2)
    return [group.clone(memory_format=torch.contiguous_format) for group in groups]


def _positions(index: Tensor, offsets: Tensor, rows: int) -> tuple[slice, Tensor]:
    """Return the positions that lie in bags, and the bag of each."""
    lengths = offsets.diff()
    if bool((lengths < 0).any()) or int(offsets[0]) < 0 or int(offsets[-1]) > index.numel():
        raise IndexError(f"offsets must not decrease and must stay inside the {index.numel()} positions")
    inside = slice(int(offsets[0]), int(offsets[-1]))
    used = index[inside]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= rows):
        raise IndexError(f"index: expected below {rows}, found {int(used.min())} to {int(used.max())}")
    return inside, torch.arange(lengths.numel(), device=index.device).repeat_interleave(lengths)
