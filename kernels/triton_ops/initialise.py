"""Initialise new rows."""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.rows import place_of


@kernel
def _init_kernel(
    rows,
    ids,
    bases,
    note,
    count,
    total,
    stream,
    offset,
    scale,
    state,
    DRAW: tl.constexpr,  # 0: the constant, 1: uniform, 2: normal
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = at < count
    row = tl.load(rows + at, mask=inside, other=-1)
    known = known_rows(row, inside, total, note)
    address = arithmetic.address_of(bases, row, known, SHIFT, WIDTH * 4)[:, None]
    first = address.to(tl.pointer_type(tl.float32))
    value = tl.zeros([ROWS, COLUMNS], tl.float32) + offset
    if DRAW > 0:
        key = arithmetic.row_key(stream, tl.load(ids + at, mask=inside, other=0))[:, None]
        drawn = arithmetic.normal(key, column) if DRAW == 2 else arithmetic.uniform(key, column)
        value = offset + scale * drawn
    tl.store(first + column, value, mask=known[:, None] & (column < DIM))
    start = tl.zeros([ROWS, COLUMNS], tl.float32) + state
    for begin in range(DIM, WIDTH, COLUMNS):
        tl.store(first + begin + column, start, mask=known[:, None] & (begin + column < WIDTH))


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
    place = place_of(chunks, rows.device)
    rows = rows.contiguous()
    height, width = tile(dim)
    launch(
        _init_kernel,
        -(-rows.numel() // height),
        rows,
        ids.contiguous(),
        place.bases,
        note_of(rows.device, place.total),
        rows.numel(),
        place.total,
        stream,
        float(offset),
        float(scale),
        float(state),
        DRAW=0 if scale == 0 else 1 + (distribution == "normal"),
        SHIFT=place.shift,
        WIDTH=place.bytes // 4,
        DIM=dim,
        ROWS=height,
        COLUMNS=width,
        warps=warps_of(height * width),
    )
    check_interpreted(rows.device)
