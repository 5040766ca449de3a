"""Write rows in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels.reference.chunks import by_chunk


def scatter(chunks: Sequence[Tensor], rows: Tensor, values: Tensor, begin: int) -> None:
    values = values.expand(rows.numel(), -1)
    for chunk, positions, local in by_chunk(chunks, rows):
        chunk[local, begin : begin + values.shape[1]] = values[positions]


def scatter_columns(chunks: Sequence[Tensor], rows: Tensor, parts: Sequence[Tensor], begin: int) -> None:
    scatter(chunks, rows, side_by_side(parts, rows.numel()), begin)


def side_by_side(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Concatenate parts [rows or 1, k] to [rows, sum of k]."""
    return torch.cat([part.expand(rows, -1) for part in parts], dim=1)
