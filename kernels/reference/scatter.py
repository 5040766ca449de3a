"""Writing rows in torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.reference.chunks import by_chunk


def scatter(chunks: Sequence[Tensor], rows: Tensor, values: Tensor, begin: int) -> None:
    values = values.expand(rows.numel(), -1)
    for chunk, positions, local in by_chunk(chunks, rows):
        chunk[local, begin : begin + values.shape[1]] = values[positions]
