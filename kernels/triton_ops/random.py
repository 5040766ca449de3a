"""Fill tensors with counter-based random numbers."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of


@kernel
def _draw_kernel(ids, out, count, stream, BELL: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
    column = tl.arange(0, TILE.columns)[None, :]
    key = arithmetic.row_key(stream, tl.load(ids + row, mask=row < count, other=0))[:, None]
    drawn = arithmetic.normal(key, column) if BELL else arithmetic.uniform(key, column)
    tl.store(out + row[:, None] * TILE.dim + column, drawn, mask=(row < count)[:, None] & (column < TILE.dim))


def uniform(stream: int, ids: Tensor, dim: int) -> Tensor:
    return _draw(stream, ids, dim, bell=False)


def normal(stream: int, ids: Tensor, dim: int) -> Tensor:
    return _draw(stream, ids, dim, bell=True)


def _draw(stream: int, ids: Tensor, dim: int, *, bell: bool) -> Tensor:
    ids = ids.contiguous()
    out = torch.empty((ids.numel(), dim), device=ids.device)
    shape = tile(dim)
    launch(
        _draw_kernel,
        -(-ids.numel() // shape.rows),
        ids,
        out,
        ids.numel(),
        stream,
        BELL=bell,
        TILE=shape,
        warps=warps_of(shape),
    )
    return out
