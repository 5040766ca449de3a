"""The second pass over rows with a learned scale: one optimizer step on the scales, then values are stored."""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from tessera.kernels.layout import RowLayout
from tessera.kernels.optimizers import OptimizerSettings
from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile
from tessera.kernels.triton_ops.merge import merge, merged
from tessera.kernels.triton_ops.optimizers import numbers, step
from tessera.kernels.triton_ops.packed import merge_constants, step_constants
from tessera.kernels.triton_ops.rows import place_of


@kernel
def _learn_kernel(
    bases,
    rows,
    ids,
    held,
    note,
    grads,
    order,
    begins,
    ends,
    sums,
    count,
    total,
    scale,
    stream,
    hyper,
    DIRECT: tl.constexpr,
    LONG: tl.constexpr,
    PIECE: tl.constexpr,
    KIND: tl.constexpr,
    NEAREST: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    VALUES_AT: tl.constexpr,
    SHIFT: tl.constexpr,
    BYTES: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = at < count
    row = tl.load(rows + at, mask=inside, other=-1)
    is_known = known_rows(row, inside, total, note)
    g = merged(grads, order, begins, ends, sums, at, is_known, note, DIRECT, LONG, PIECE, DIM, ROWS, COLUMNS)
    address = arithmetic.address_of(bases, row, is_known, SHIFT, BYTES)[:, None]
    known = is_known[:, None]
    mask = known & (column < DIM)
    w = tl.load(held + at[:, None] * DIM + column, mask=mask, other=0.0)
    pointer = address.to(tl.pointer_type(tl.float32))
    size = tl.load(pointer, mask=known, other=1.0)
    high: tl.constexpr = (1 << (BITS - 1)) - 1
    low: tl.constexpr = -high - 1
    x = tl.div_rn(w, size + tl.zeros_like(w))
    inner = tl.minimum(tl.maximum(x, low * 1.0), high * 1.0)
    slope = tl.where(x <= low, low * 1.0, tl.where(x >= high, high * 1.0, arithmetic.nearest(inner) - inner))
    slope = scale * tl.sum(tl.where(mask, g * slope, 0.0), axis=1, keep_dims=True)
    # The optimizer on scales [ROWS, 1], whose state is at byte 4.
    zero = tl.zeros_like(address).to(tl.int32)
    new = step(
        size,
        slope,
        address + 4,
        address,
        zero,
        known,
        known,
        size,
        hyper,
        KIND,
        DIM=1,
        HALF_MOMENTS=False,
        ROWS=1,
        COLUMNS=1,
    )
    new = tl.maximum(new, 0.5 * size)  # a scale stays above zero
    tl.store(pointer, new, mask=known)
    key = tl.full([ROWS, 1], 0, tl.uint64)
    if not NEAREST:
        key = arithmetic.row_key(stream, tl.load(ids + at, mask=inside, other=0))[:, None]
    arithmetic.store_values(address + VALUES_AT, column, mask, w, new, key, 0, FORMAT, BITS, NEAREST, ROWS, COLUMNS)


def packed_learn_steps(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    held: Tensor,
    layout: Sequence[int],
    settings: Sequence[float],
    stream: int,
) -> None:
    place, where = place_of(chunks, rows.device), RowLayout(*layout)
    rows, ids, count = rows.contiguous(), ids.contiguous(), rows.numel()
    note = note_of(rows.device, place.total, count)
    given = merge(grads, inverse, count, note)
    height, width = tile(where.dim, least=4)
    launch(
        _learn_kernel,
        -(-count // height),
        place.bases,
        rows,
        ids,
        held,
        note,
        *given[:5],
        count,
        place.total,
        float(OptimizerSettings(*settings).gradient_scale),
        stream,
        numbers(settings),
        **merge_constants(given),
        **step_constants(place, where),
        ROWS=height,
        COLUMNS=width,
        warps=1,
    )
    check_interpreted(rows.device)
