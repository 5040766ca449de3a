"""Initialise new rows in torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.kernels.reference.chunks import by_chunk
from tessera.kernels.reference.random import normal, uniform


def init_rows(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    dim: int,
    distribution: str,
    numbers: Sequence[float],
    stream: int,
) -> None:
    offset, scale, state = numbers
    draw = normal if distribution == "normal" else uniform
    for chunk, positions, local in by_chunk(chunks, rows):
        block = chunk.new_full((local.numel(), chunk.shape[1]), state)
        block[:, :dim] = offset
        if scale != 0:
            block[:, :dim] += scale * draw(stream, ids[positions], dim)
        chunk[local] = block
