"""Initialise new rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.rows import place_of


class _Given(NamedTuple):
    bases: Tensor
    rows: Tensor
    ids: Tensor
    note: Tensor
    offset: float
    scale: float
    state: float


@kernel
def _init_kernel(
    given,
    count,
    total,
    stream,
    DRAW: tl.constexpr,  # 0: the constant, 1: uniform, 2: normal
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
    column = tl.arange(0, TILE.columns)[None, :]
    inside = at < count
    row = tl.load(given.rows + at, mask=inside, other=-1)
    known = known_rows(row, inside, total, given.note)
    address = arithmetic.address_of(given.bases, row, known, CHUNK)[:, None]
    first = address.to(tl.pointer_type(tl.float32))
    value = tl.full([TILE.rows, TILE.columns], 0.0, tl.float32) + given.offset
    if DRAW > 0:
        key = arithmetic.row_key(stream, tl.load(given.ids + at, mask=inside, other=0))[:, None]
        drawn = arithmetic.normal(key, column) if DRAW == 2 else arithmetic.uniform(key, column)
        value = given.offset + given.scale * drawn
    tl.store(first + column, value, mask=known[:, None] & (column < TILE.dim))
    start = tl.full([TILE.rows, TILE.columns], 0.0, tl.float32) + given.state
    WIDTH: tl.constexpr = CHUNK.bytes // 4
    for begin in range(TILE.dim, WIDTH, TILE.columns):
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
    rows, note = rows.contiguous(), note_of(rows.device, place.total)
    shape = tile(dim)
    launch(
        _init_kernel,
        -(-rows.numel() // shape.rows),
        _Given(place.bases, rows, ids.contiguous(), note, float(offset), float(scale), float(state)),
        rows.numel(),
        place.total,
        stream,
        DRAW=0 if scale == 0 else 1 + (distribution == "normal"),
        CHUNK=place.chunk,
        TILE=shape,
        warps=warps_of(shape),
    )
    check_interpreted(rows.device)
