"""Read rows as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops.arithmetic import address_of
from tessera.kernels.triton_ops.faults import check_interpreted, known_positions, known_rows, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.rows import place_of


@triton.jit
def rows_at(rows, inverse, at, inside, count, note, HAS_INVERSE: tl.constexpr):
    """Return the rows that positions `at` ask for; -1 outside."""
    if HAS_INVERSE:
        at = tl.load(inverse + at, mask=inside, other=0)
        inside = known_positions(at, inside, count, note)
    return tl.load(rows + at, mask=inside, other=-1)


@kernel
def _gather_kernel(
    out,
    bases,
    rows,
    inverse,
    default,
    note,
    positions,
    count,
    total,
    HAS_INVERSE: tl.constexpr,
    HAS_DEFAULT: tl.constexpr,
    SHIFT: tl.constexpr,
    BYTES: tl.constexpr,
    BEGIN: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = at < positions
    row = rows_at(rows, inverse, at, inside, count, note, HAS_INVERSE)
    known = known_rows(row, inside, total, note)
    address = address_of(bases, row, known, SHIFT, BYTES)[:, None]
    pointer = address.to(out.dtype) + BEGIN + column
    value = tl.load(pointer, mask=known[:, None] & (column < DIM), other=0)
    if HAS_DEFAULT:
        fallback = tl.load(default + column, mask=column < DIM, other=0)
        value = tl.where(known[:, None], value, fallback)
    tl.store(out + at[:, None] * DIM + column, value, mask=inside[:, None] & (column < DIM))


def gather(
    chunks: Sequence[Tensor],
    rows: Tensor,
    dim: int,
    inverse: Tensor | None,
    default: Tensor | None,
    begin: int,
) -> Tensor:
    place = place_of(chunks, rows.device)
    rows, dtype = rows.contiguous(), chunks[0].dtype if chunks else torch.float32
    count = rows.numel() if inverse is None else inverse.numel()
    out = torch.empty((count, dim), dtype=dtype, device=rows.device)
    height, width = tile(dim)
    # Any element of two bytes moves as an int16: the interpreter knows no bfloat16.
    moved = torch.int16 if dtype == torch.bfloat16 else dtype
    launch(
        _gather_kernel,
        -(-count // height),
        out.view(moved),
        place.bases,
        rows,
        rows if inverse is None else inverse.contiguous(),
        out.view(moved) if default is None else default.contiguous().view(moved),
        note_of(rows.device, place.total, rows.numel()),
        count,
        rows.numel(),
        place.total,
        HAS_INVERSE=inverse is not None,
        HAS_DEFAULT=default is not None,
        SHIFT=place.shift,
        BYTES=place.bytes,
        BEGIN=begin,
        DIM=dim,
        ROWS=height,
        COLUMNS=width,
        warps=warps_of(height * width),
    )
    check_interpreted(rows.device)
    return out
