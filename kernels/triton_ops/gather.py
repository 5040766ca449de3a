"""Read rows as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops.arithmetic import address_of
from tessera.kernels.triton_ops.faults import check_interpreted, known_positions, known_rows, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.rows import Chunk, place_of


@triton.jit
def rows_at(given, at, inside, count, HAS_INVERSE: tl.constexpr):
    """Return the rows that positions `at` ask for; -1 outside. given: with rows, inverse and note."""
    if HAS_INVERSE:
        at = tl.load(given.inverse + at, mask=inside, other=0)
        inside = known_positions(at, inside, count, given.note)
    return tl.load(given.rows + at, mask=inside, other=-1)


class _Given(NamedTuple):
    out: Tensor
    bases: Tensor
    rows: Tensor
    inverse: Tensor
    default: Tensor
    note: Tensor


class _Plan(NamedTuple):
    has_inverse: bool
    has_default: bool
    chunk: Chunk
    begin: int


@kernel
def _gather_kernel(
    given,
    positions,
    count,
    total,
    PLAN: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
    column = tl.arange(0, TILE.columns)[None, :]
    inside = at < positions
    row = rows_at(given, at, inside, count, PLAN.has_inverse)
    known = known_rows(row, inside, total, given.note)
    address = address_of(given.bases, row, known, PLAN.chunk)[:, None]
    pointer = address.to(given.out.dtype) + PLAN.begin + column
    value = tl.load(pointer, mask=known[:, None] & (column < TILE.dim), other=0)
    if PLAN.has_default:
        fallback = tl.load(given.default + column, mask=column < TILE.dim, other=0)
        value = tl.where(known[:, None], value, fallback)
    tl.store(given.out + at[:, None] * TILE.dim + column, value, mask=inside[:, None] & (column < TILE.dim))


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
    shape = tile(dim)
    # Any element of two bytes moves as an int16: the interpreter knows no bfloat16.
    moved = torch.int16 if dtype == torch.bfloat16 else dtype
    given = _Given(
        out.view(moved),
        place.bases,
        rows,
        rows if inverse is None else inverse.contiguous(),
        out.view(moved) if default is None else default.contiguous().view(moved),
        note_of(rows.device, place.total, rows.numel()),
    )
    launch(
        _gather_kernel,
        -(-count // shape.rows),
        given,
        count,
        rows.numel(),
        place.total,
        PLAN=_Plan(inverse is not None, default is not None, place.chunk, begin),
        TILE=shape,
        warps=warps_of(shape),
    )
    check_interpreted(rows.device)
    return out
