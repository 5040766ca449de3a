"""Sum looked-up rows over bags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.kernels import autograd, backend
from tessera.kernels.chunks import check_index
from tessera.kernels.reference import pool as reference


def pool(
    values: Tensor,
    index: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
    keys: int = 1,
    widths: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Return sums over bags of rows, differentiable in them: for each group of columns float32 [B, keys, its width].

    values: float32 [u, w]; index: int64 [n], 0 <= index < u; offsets: int64 [keys * B + 1], not decreasing, bag b of
    key k is positions offsets[k B + b] to offsets[k B + b + 1] of `index`; weights: float32 [n], factors of the
    positions, or None; widths: of the groups, w together (None: one group). Positions are summed in order, forward and
    backward; an empty bag gives zeros. Raises ValueError for wrong dtypes or shapes, IndexError for an index or offset
    out of range.
    """
    check_index("index", index)
    check_index("offsets", offsets)
    if values.dtype != torch.float32 or values.dim() != 2:
        raise ValueError(f"values: expected float32 [u, w], found {values.dtype} {list(values.shape)}")
    if offsets.numel() == 0:
        raise ValueError("offsets: expected int64 [keys * B + 1], found no element")
    if keys < 1 or (offsets.numel() - 1) % keys:
        raise ValueError(f"offsets: expected as many bags of each of {keys} keys, found {offsets.numel() - 1} bags")
    widths = [values.shape[1]] if widths is None else list(widths)
    if not widths or sum(widths) != values.shape[1]:
        raise ValueError(f"widths: expected {values.shape[1]} columns together, found {widths}")
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != index.shape):
        found = f"{weights.dtype} {list(weights.shape)}"
        raise ValueError(f"weights: expected float32 [{index.numel()}], found {found}")
    sums: tuple[Tensor, ...] = autograd.apply(_Pool, values, index, offsets, weights, keys, widths)
    return sums


def sum_by_row(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Return float32 [rows, w]: for each row the sum of those values float32 [n, w] that `index` (int64 [n],
    0 <= index < rows) gives to it, in order of position (no race decides about bits); zeros where there are none.

    This is the gradient of bags of one position each. Raises ValueError for wrong dtypes or shapes, IndexError for an
    index out of range.
    """
    check_index("index", index)
    if values.dtype != torch.float32 or values.dim() != 2 or len(values) != len(index):
        found = f"{values.dtype} {list(values.shape)}"
        raise ValueError(f"values: expected float32 [{len(index)}, w], found {found}")
    offsets = torch.arange(len(index) + 1, device=index.device)
    ops = backend.ops_for(values) or reference
    sums: Tensor = ops.pool_backward([values.unsqueeze(1)], index, offsets, None, rows)
    return sums


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, keys: int, widths: list[int]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index, offsets, weights)
        ctx.rows = values.shape[0]
        ops = backend.ops_for(values) or reference
        return tuple(ops.pool(values, index, offsets, weights, keys, widths))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, offsets, weights = ctx.saved_tensors
        ops = backend.ops_for(grads[0]) or reference
        return ops.pool_backward(grads, index, offsets, weights, ctx.rows), None, None, None, None, None


@torch.library.register_fake("tessera::pool")
def _pool_fake(
    values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, keys: int, widths: list[int]
) -> list[Tensor]:
    return [values.new_empty(((offsets.shape[0] - 1) // keys, keys, width)) for width in widths]


@torch.library.register_fake("tessera::pool_backward")
def _pool_backward_fake(
    grads: Sequence[Tensor], index: Tensor, offsets: Tensor, weights: Tensor | None, rows: int
) -> Tensor:
    return grads[0].new_empty((rows, sum(grad.shape[2] for grad in grads)))
