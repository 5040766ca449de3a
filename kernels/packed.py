"""Packed rows of low precision (`kernels/layout.py`): read, updated and, with a learned scale, updated twice.

The values of a row are dequantised where it is read or updated; nothing holds the table, or a chunk, in float32.

LPT and ALPT (Li et al., AAAI 2023, arXiv 2212.05735). With a fixed scale D a step is one `packed_update`:

    w = D Q;  w_new = optimizer(w, gradient);  Q = quantise(w_new / D)

With a learned one it has two passes over the same batch:

    packed_update with `held`   w_new as above goes to `held` (float32, the rows of the batch alone); Q stays
    packed_fake_quantise           w^ = D clamp(nearest(w_new / D)), for the second forward pass
    packed_learn_scales          dL/dD = scale sum_c dL/dw^_c  { nearest(x) - x  inside the range,  x = w_new_c / D
                                                              { the end of the range that x is at or beyond
                                D_new = optimizer(D, dL/dD), and D / 2 or more;  Q = quantise(w_new / D_new)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_chunks, check_index
from tessera.kernels.formats import is_int
from tessera.kernels.layout import RowLayout
from tessera.kernels.optimizers import OptimizerSettings
from tessera.kernels.reference import packed as reference


class BatchRows(NamedTuple):
    """The rows that a batch updates. rows: int64 [u], distinct, -1 is skipped; ids: int64 [u] of the rows, which seed
    stochastic rounding; inverse: int64 [n], the row of gradient i is rows[inverse[i]] (None: n == u, in order)."""

    rows: Tensor
    ids: Tensor
    inverse: Tensor | None = None


def packed_gather(chunks: Sequence[Tensor], rows: Tensor, layout: RowLayout, inverse: Tensor | None = None) -> Tensor:
    """Return values of rows: float32 [u, dim], or [n, dim] with `inverse`; row -1 gives zeros.

    chunks: uint8 [chunk_rows, layout.bytes]; rows: int64 [u]; inverse: int64 [n], 0 <= inverse < u. Raises
    ValueError for wrong dtypes or shapes, IndexError for a row or inverse out of range.
    """
    _check(chunks, rows, layout, inverse)
    ops = backend.ops_for(rows) or reference
    return ops.packed_gather(chunks, rows, layout, inverse)


def packed_update(
    chunks: Sequence[Tensor],
    batch: BatchRows,
    grads: Tensor,
    layout: RowLayout,
    settings: OptimizerSettings,
    *,
    stream: int,
    held: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Apply one optimizer step to rows in place: merge gradients, dequantise, update, quantise.

    grads: float32 [n, dim]; stream: that of `kernels/random.py` for seed, table and step, which with the ids seeds
    stochastic rounding; held: float32 [u, dim], takes the new values instead of the rows, whose state
    is updated all the same. kept: float32 [u], the part of its values that a row keeps before the step. bf16 moments
    are rounded stochastically always. Raises as `packed_gather`.
    """
    rows, ids, inverse = batch
    _check(chunks, rows, layout, inverse)
    _check_update(batch, grads, layout)
    if held is not None:
        _check_held(rows, layout, held)
    if kept is not None and (kept.dtype != torch.float32 or kept.shape != rows.shape):
        raise ValueError(f"kept: expected float32 {list(rows.shape)}, found {kept.dtype} {list(kept.shape)}")
    ops = backend.ops_for(rows) or reference
    ops.packed_update(chunks, rows, ids, grads, inverse, held, layout, settings, stream, kept)


def packed_fake_quantise(
    chunks: Sequence[Tensor], rows: Tensor, held: Tensor, layout: RowLayout, inverse: Tensor | None = None
) -> Tensor:
    """Return `held` (float32 [u, dim]) as their rows would hold them, by nearest rounding; else as `packed_gather`."""
    _check(chunks, rows, layout, inverse)
    _check_held(rows, layout, held)
    ops = backend.ops_for(rows) or reference
    return ops.packed_fake_quantise(chunks, rows, held, layout, inverse)


def packed_learn_scales(
    chunks: Sequence[Tensor],
    batch: BatchRows,
    grads: Tensor,
    layout: RowLayout,
    settings: OptimizerSettings,
    *,
    stream: int,
    held: Tensor,
) -> None:
    """Update the scales of rows by the gradients of what `packed_fake_quantise` gave, and store `held` with them.

    settings are those of the scale's own optimizer, of the same kind as the values'. Other arguments as
    `packed_update`. Raises as `packed_gather`.
    """
    rows, ids, inverse = batch
    _check(chunks, rows, layout, inverse)
    _check_held(rows, layout, held)
    _check_update(batch, grads, layout)
    if not layout.learned:
        raise ValueError("layout: expected one with a learned scale")
    ops = backend.ops_for(rows) or reference
    ops.packed_learn_scales(chunks, rows, ids, grads, inverse, held, layout, settings, stream)


def _check(chunks: Sequence[Tensor], rows: Tensor, layout: RowLayout, inverse: Tensor | None) -> None:
    check_index("rows", rows)
    if inverse is not None:
        check_index("inverse", inverse)
    check_chunks(chunks, layout.bytes, torch.uint8)
    if chunks and chunks[0].shape[1] != layout.bytes:
        raise ValueError(f"chunks: expected rows of {layout.bytes} bytes, found {chunks[0].shape[1]}")


def _check_update(batch: BatchRows, grads: Tensor, layout: RowLayout) -> None:
    rows, ids, inverse = batch
    check_index("ids", ids)
    if ids.numel() != rows.numel():
        raise ValueError(f"ids: expected {rows.numel()} as there are rows, found {ids.numel()}")
    count = (rows if inverse is None else inverse).numel()
    if grads.dtype != torch.float32 or grads.shape != (count, layout.dim):
        raise ValueError(f"grads: expected float32 [{count}, {layout.dim}], found {grads.dtype} {list(grads.shape)}")


def _check_held(rows: Tensor, layout: RowLayout, held: Tensor) -> None:
    if not is_int(layout.format):
        raise ValueError(f"held: expected a layout with a scale, found {layout.format}")
    shape = (rows.numel(), layout.dim)
    if held.dtype != torch.float32 or held.shape != shape or not held.is_contiguous():
        raise ValueError(f"held: expected contiguous float32 {list(shape)}, found {held.dtype} {list(held.shape)}")


@torch.library.register_fake("tessera::packed_gather")
def _gather_fake(chunks: Sequence[Tensor], rows: Tensor, layout: Sequence[int], inverse: Tensor | None) -> Tensor:
    count = rows.shape[0] if inverse is None else inverse.shape[0]
    return rows.new_empty((count, RowLayout(*layout).dim), dtype=torch.float32)


@torch.library.register_fake("tessera::packed_fake_quantise")
def _fake_quantise_fake(
    chunks: Sequence[Tensor], rows: Tensor, held: Tensor, layout: Sequence[int], inverse: Tensor | None
) -> Tensor:
    return _gather_fake(chunks, rows, layout, inverse)
