"""Rows with optimizer state: read and updated. What a learned scale adds is in `learned.py`.

One set of kernels for packed rows and for plain float32 rows, which differ in where in a row things are
(`kernels/layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.formats import BITS
from tessera.kernels.layout import RowLayout
from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.gather import rows_at
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.merge import PIECE, Merge, merge, merged
from tessera.kernels.triton_ops.optimizers import numbers, step
from tessera.kernels.triton_ops.rows import Place, place_of


@kernel
def _read_kernel(
    out,
    bases,
    rows,
    inverse,
    held,
    note,
    positions,
    count,
    total,
    HAS_INVERSE: tl.constexpr,
    AHEAD: tl.constexpr,  # round `held` instead of reading values
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
    inside = at < positions
    row = rows_at(rows, inverse, at, inside, count, note, HAS_INVERSE)
    known = known_rows(row, inside, total, note)
    address = arithmetic.address_of(bases, row, known, SHIFT, BYTES)[:, None]
    mask = known[:, None] & (column < DIM)
    size = tl.full([ROWS, 1], 1.0, tl.float32)
    if FORMAT >= arithmetic.INT8:
        size = tl.load(address.to(tl.pointer_type(tl.float32)), mask=known[:, None], other=1.0)
    if AHEAD:
        place = at
        if HAS_INVERSE:
            place = tl.load(inverse + at, mask=known, other=0)
        x = tl.load(held + place[:, None] * DIM + column, mask=mask, other=0.0)
        value = size * arithmetic.to_code(tl.div_rn(x, size + tl.zeros_like(x)), x, NEAREST=True, BITS=BITS)
    else:
        value = arithmetic.load_values(address + VALUES_AT, column, mask, size, FORMAT, BITS)
    value = tl.where(mask, value, 0.0)
    tl.store(out + at[:, None] * DIM + column, value, mask=inside[:, None] & (column < DIM))


def packed_gather(chunks: Sequence[Tensor], rows: Tensor, layout: Sequence[int], inverse: Tensor | None) -> Tensor:
    return _read(chunks, rows, None, RowLayout(*layout), inverse)


def packed_look_ahead(
    chunks: Sequence[Tensor], rows: Tensor, held: Tensor, layout: Sequence[int], inverse: Tensor | None
) -> Tensor:
    return _read(chunks, rows, held, RowLayout(*layout), inverse)


def _read(
    chunks: Sequence[Tensor], rows: Tensor, held: Tensor | None, layout: RowLayout, inverse: Tensor | None
) -> Tensor:
    place = place_of(chunks, rows.device)
    rows, dim = rows.contiguous(), layout.dim
    count = rows.numel() if inverse is None else inverse.numel()
    out = torch.empty((count, dim), device=rows.device)
    height, width = tile(dim, least=4)
    launch(
        _read_kernel,
        -(-count // height),
        out,
        place.bases,
        rows,
        rows if inverse is None else inverse.contiguous(),
        out if held is None else held,
        note_of(rows.device, place.total, rows.numel()),
        count,
        rows.numel(),
        place.total,
        HAS_INVERSE=inverse is not None,
        AHEAD=held is not None,
        FORMAT=layout.format_number,
        BITS=BITS[layout.format],
        VALUES_AT=layout.values_at,
        SHIFT=place.shift,
        BYTES=place.bytes,
        DIM=dim,
        ROWS=height,
        COLUMNS=width,
        warps=warps_of(height * width),
    )
    check_interpreted(rows.device)
    return out


@kernel
def _update_kernel(
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
    stream,
    hyper,
    DIRECT: tl.constexpr,
    LONG: tl.constexpr,
    PIECE: tl.constexpr,
    KIND: tl.constexpr,
    HOLD: tl.constexpr,
    NEAREST: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_AT: tl.constexpr,
    MOMENTS_AT: tl.constexpr,
    VALUES_AT: tl.constexpr,
    HALF_MOMENTS: tl.constexpr,
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
    size = tl.full([ROWS, 1], 1.0, tl.float32)
    if FORMAT >= arithmetic.INT8:
        size = tl.load(address.to(tl.pointer_type(tl.float32)), mask=known, other=1.0)
    key = tl.full([ROWS, 1], 0, tl.uint64)
    if HALF_MOMENTS or not (NEAREST or FORMAT == arithmetic.FP32):
        key = arithmetic.row_key(stream, tl.load(ids + at, mask=inside, other=0))[:, None]
    w = arithmetic.load_values(address + VALUES_AT, column, mask, size, FORMAT, BITS)
    state, moments = address + STATE_AT, address + MOMENTS_AT
    w = step(w, g, state, moments, column, known, mask, key, hyper, KIND, DIM, HALF_MOMENTS, ROWS, COLUMNS)
    if HOLD:
        tl.store(held + at[:, None] * DIM + column, tl.where(mask, w, 0.0), mask=inside[:, None] & (column < DIM))
    else:
        arithmetic.store_values(
            address + VALUES_AT, column, mask, w, size, key, 0, FORMAT, BITS, NEAREST, ROWS, COLUMNS
        )


def update(
    chunks: Sequence[Tensor],
    rows: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    layout: Sequence[int],
    settings: Sequence[float],
) -> None:
    packed_update(chunks, rows, rows, grads, inverse, None, layout, settings, 0)


def packed_update(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    held: Tensor | None,
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
        _update_kernel,
        -(-count // height),
        place.bases,
        rows,
        ids,
        given.grads if held is None else held,
        note,
        *given[:5],
        count,
        place.total,
        stream,
        numbers(settings),
        **merge_constants(given),
        HOLD=held is not None,
        STATE_AT=where.state_at,
        MOMENTS_AT=where.moments_at,
        HALF_MOMENTS=where.moments > 0,
        **step_constants(place, where),
        ROWS=height,
        COLUMNS=width,
        warps=1,
    )
    check_interpreted(rows.device)


def step_constants(place: Place, layout: RowLayout) -> dict[str, object]:
    """Return the constants that both updates of rows are compiled for."""
    return {
        "KIND": layout.optimizer_number,
        "NEAREST": layout.nearest > 0,
        "FORMAT": layout.format_number,
        "BITS": BITS[layout.format],
        "VALUES_AT": layout.values_at,
        "SHIFT": place.shift,
        "BYTES": place.bytes,
        "DIM": layout.dim,
    }


def merge_constants(given: Merge) -> dict[str, object]:
    return {"DIRECT": given.direct, "LONG": given.long, "PIECE": PIECE}
