"""Reading rows as they are, and pooling them over bags."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_ops.arithmetic import address_of
from kernels.triton_ops.faults import OFFSETS, check_interpreted, known_positions, known_rows, note_of
from kernels.triton_ops.launch import launch, tile, warps_of
from kernels.triton_ops.rows import place_of


@triton.jit
def rows_at(rows, inverse, at, inside, count, note, HAS_INVERSE: tl.constexpr):
    """The rows that positions `at` ask for; -1 outside."""
    if HAS_INVERSE:
        at = tl.load(inverse + at, mask=inside, other=0)
        inside = known_positions(at, inside, count, note)
    return tl.load(rows + at, mask=inside, other=-1)


@triton.jit
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


@triton.jit
def _pool_kernel(
    out,
    bases,
    rows,
    inverse,
    offsets,
    weights,
    default,
    note,
    bags,
    positions,
    count,
    total,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DEFAULT: tl.constexpr,
    MEAN: tl.constexpr,
    SHIFT: tl.constexpr,
    BYTES: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = bag < bags
    begin = tl.load(offsets + bag, mask=inside, other=0)
    end = tl.load(offsets + bag + 1, mask=inside, other=0)
    good = (begin >= 0) & (begin <= end) & (end <= positions)
    tl.atomic_max(note + OFFSETS + tl.zeros_like(bag), tl.full([ROWS], 1, tl.int64), mask=inside & ~good, sem="relaxed")
    length = tl.where(good, end - begin, 0)
    fallback = tl.zeros([1, COLUMNS], tl.float32)
    if HAS_DEFAULT:
        fallback = tl.load(default + column, mask=column < DIM, other=0.0)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in range(0, tl.max(length, axis=0)):
        within = j < length
        row = rows_at(rows, inverse, begin + j, within, count, note, True)
        known = known_rows(row, within, total, note)
        address = address_of(bases, row, known, SHIFT, BYTES)[:, None]
        pointer = address.to(tl.pointer_type(tl.float32)) + column
        value = tl.load(pointer, mask=known[:, None] & (column < DIM), other=0.0)
        value = tl.where(known[:, None], value, fallback)
        if HAS_WEIGHTS:
            value = value * tl.load(weights + begin + j, mask=within, other=0.0)[:, None]
        sums = tl.where(within[:, None], sums + value, sums)
    if MEAN:
        sums = tl.div_rn(sums, tl.maximum(length, 1).to(tl.float32)[:, None] + tl.zeros_like(sums))
    tl.store(out + bag[:, None] * DIM + column, sums, mask=inside[:, None] & (column < DIM))


def gather_pooled(
    chunks: Sequence[Tensor],
    rows: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    dim: int,
    weights: Tensor | None,
    mean: bool,
    default: Tensor | None,
) -> Tensor:
    place = place_of(chunks, rows.device)
    rows, bags = rows.contiguous(), offsets.numel() - 1
    out = torch.empty((bags, dim), device=rows.device)
    height, width = tile(dim)
    launch(
        _pool_kernel,
        -(-bags // height),
        out,
        place.bases,
        rows,
        inverse.contiguous(),
        offsets.contiguous(),
        out if weights is None else weights.contiguous(),
        out if default is None else default.contiguous(),
        note_of(rows.device, place.total, rows.numel()),
        bags,
        inverse.numel(),
        rows.numel(),
        place.total,
        HAS_WEIGHTS=weights is not None,
        HAS_DEFAULT=default is not None,
        MEAN=mean,
        SHIFT=place.shift,
        BYTES=place.bytes,
        DIM=dim,
        ROWS=height,
        COLUMNS=width,
        warps=warps_of(height * width),
    )
    check_interpreted(rows.device)
    return out
