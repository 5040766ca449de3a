"""Read rows in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels.reference.chunks import by_chunk


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


def checked(inverse: Tensor, rows: Tensor) -> Tensor:
    if inverse.numel() and (int(inverse.min()) < 0 or int(inverse.max()) >= rows.numel()):
        raise IndexError(f"inverse: expected below {rows.numel()}, found {int(inverse.min())} to {int(inverse.max())}")
    return inverse
