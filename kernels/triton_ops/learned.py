"""The second pass over rows with a learned scale: one optimizer step on the scales, then values are stored."""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from tessera.kernels.layout import RowLayout
from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.launch import kernel, launch
from tessera.kernels.triton_ops.merge import merge, merged
from tessera.kernels.triton_ops.optimizers import Step, numbers, step
from tessera.kernels.triton_ops.packed import RowsToUpdate, update_plan
from tessera.kernels.triton_ops.rows import place_of


@kernel
def _learn_kernel(given, grads, count, total, stream, hyper, PLAN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * PLAN.tile.rows + tl.arange(0, PLAN.tile.rows)
    column = tl.arange(0, PLAN.tile.columns)[None, :]
    inside = at < count
    row = tl.load(given.rows + at, mask=inside, other=-1)
    is_known = known_rows(row, inside, total, given.note)
    g = merged(grads, at, is_known, PLAN.sum, PLAN.tile)
    address = arithmetic.address_of(given.bases, row, is_known, PLAN.chunk)[:, None]
    known = is_known[:, None]
    cells = arithmetic.Cells(column, known, known & (column < PLAN.tile.dim))
    w = tl.load(given.held + at[:, None] * PLAN.tile.dim + column, mask=cells.mask, other=0.0)
    pointer = address.to(tl.pointer_type(tl.float32))
    size = tl.load(pointer, mask=known, other=1.0)
    high: tl.constexpr = (1 << (PLAN.stored.bits - 1)) - 1
    low: tl.constexpr = -high - 1
    x = tl.div_rn(w, size + tl.zeros_like(w))
    inner = tl.minimum(tl.maximum(x, low * 1.0), high * 1.0)
    slope = tl.where(x <= low, low * 1.0, tl.where(x >= high, high * 1.0, arithmetic.nearest(inner) - inner))
    slope = hyper.gradient_scale * tl.sum(tl.where(cells.mask, g * slope, 0.0), axis=1, keep_dims=True)
    # The optimizer on scales [ROWS, 1].
    scales = arithmetic.Cells(tl.zeros_like(address).to(tl.int32), known, known)
    new = step(size, slope, address, scales, size, hyper, PLAN.step)
    new = tl.maximum(new, 0.5 * size)  # a scale stays above zero
    tl.store(pointer, new, mask=known)
    key = tl.full([PLAN.tile.rows, 1], 0, tl.uint64)
    if not PLAN.stored.nearest:
        key = arithmetic.row_key(stream, tl.load(given.ids + at, mask=inside, other=0))[:, None]
    arithmetic.store_values(address + PLAN.values_at, cells, w, new, key, 0, PLAN.stored)


def packed_learn_scales(
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
    gradients = merge(grads, inverse, count, note)
    of_scales = Step(where.optimizer_number, dim=1, state_at=4, moments_at=0, half_moments=False)
    plan = update_plan(place, where, gradients.how, of_scales)
    launch(
        _learn_kernel,
        -(-count // plan.tile.rows),
        RowsToUpdate(place.bases, rows, ids, held, note, note),
        gradients.grads,
        count,
        place.total,
        stream,
        numbers(settings),
        PLAN=plan,
        warps=1,
    )
    check_interpreted(rows.device)
