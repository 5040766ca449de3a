"""Reading rows in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference.chunks import by_chunk


def gather(
    chunks: Sequence[Tensor],
    rows: Tensor,
    dim: int,
    inverse: Tensor | None,
    default: Tensor | None,
    begin: int,
) -> Tensor:
    dtype = chunks[0].dtype if chunks else torch.float32
    result = torch.zeros((rows.numel(), dim), dtype=dtype, device=rows.device)
    if default is not None:
        result += default
    for chunk, positions, local in by_chunk(chunks, rows):
        result[positions] = chunk[local, begin : begin + dim]
    return result if inverse is None else result[checked(inverse, rows)]


def gather_pooled(
    chunks: Sequence[Tensor],
    rows: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    dim: int,
    weights: Tensor | None,
    mean: bool,
    default: Tensor | None,
) -> Tensor:
    lengths = offsets.diff()
    if bool((lengths < 0).any()) or int(offsets[0]) < 0 or int(offsets[-1]) > inverse.numel():
        raise IndexError(f"offsets must not decrease and must stay inside the {inverse.numel()} positions")
    inside = slice(int(offsets[0]), int(offsets[-1]))
    values = gather(chunks, rows, dim, inverse[inside], default, 0)
    if weights is not None:
        values = values * weights[inside, None]
    bags = torch.arange(lengths.numel(), device=rows.device).repeat_interleave(lengths)
    result = torch.zeros((lengths.numel(), dim), device=rows.device).index_add_(0, bags, values)
    return result / lengths.clamp(min=1)[:, None] if mean else result


def checked(inverse: Tensor, rows: Tensor) -> Tensor:
    if inverse.numel() and (int(inverse.min()) < 0 or int(inverse.max()) >= rows.numel()):
        raise IndexError(f"inverse: expected below {rows.numel()}, found {int(inverse.min())} to {int(inverse.max())}")
    return inverse
