"""Sums over bags of rows that were looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend
from kernels.chunks import check_index
from kernels.reference import pool as reference


def pool(values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over bags of rows, differentiable in them.

    values: float32 [u, w]; index: int64 [n], 0 <= index < u; offsets: int64 [B + 1], not decreasing, bag b is positions
    offsets[b] to offsets[b + 1] of `index`; weights: float32 [n], factors of the positions, or None. Positions are
    summed in order, forward and backward; an empty bag gives zeros. Returns float32 [B, w]. Raises ValueError for wrong
    dtypes or shapes, IndexError for an index or offset out of range.
    """
    check_index("index", index)
    check_index("offsets", offsets)
    if values.dtype != torch.float32 or values.dim() != 2:
        raise ValueError(f"values: expected float32 [u, w], found {values.dtype} {list(values.shape)}")
    if offsets.numel() == 0:
        raise ValueError("offsets: expected int64 [B + 1], found no element")
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != index.shape):
        found = f"{weights.dtype} {list(weights.shape)}"
        raise ValueError(f"weights: expected float32 [{index.numel()}], found {found}")
    return _Pool.apply(values, index, offsets, weights)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, offsets, weights)
        ctx.rows = values.shape[0]
        ops = backend.ops_for(values) or reference
        return ops.pool(values, index, offsets, weights)

    @staticmethod
    def backward(ctx, grads: Tensor):
        index, offsets, weights = ctx.saved_tensors
        ops = backend.ops_for(grads) or reference
        return ops.pool_backward(grads, index, offsets, weights, ctx.rows), None, None, None


@torch.library.register_fake("tessera::pool")
def _pool_fake(values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    return values.new_empty((offsets.shape[0] - 1, values.shape[1]))


@torch.library.register_fake("tessera::pool_backward")
def _pool_backward_fake(grads: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    return grads.new_empty((rows, grads.shape[1]))
