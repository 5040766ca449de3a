"""Write rows as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.reference.scatter import side_by_side
from tessera.kernels.triton_ops.arithmetic import address_of
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.rows import place_of


@kernel
def _scatter_kernel(
    values,
    bases,
    rows,
    note,
    count,
    total,
    EVERY: tl.constexpr,
    SHIFT: tl.constexpr,
    BYTES: tl.constexpr,
    BEGIN: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = at < count
    row = tl.load(rows + at, mask=inside, other=-1)
    known = known_rows(row, inside, total, note)
    mask = known[:, None] & (column < DIM)
    value = tl.load(values + (at[:, None] * DIM if EVERY else at[:, None] * 0) + column, mask=mask, other=0)
    address = address_of(bases, row, known, SHIFT, BYTES)[:, None]
    tl.store(address.to(values.dtype) + BEGIN + column, value, mask=mask)


def scatter(chunks: Sequence[Tensor], rows: Tensor, values: Tensor, begin: int) -> None:
    place = place_of(chunks, rows.device)
    rows, values = rows.contiguous(), values.contiguous()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    height, width = tile(values.shape[1])
    launch(
        _scatter_kernel,
        -(-rows.numel() // height),
        values,
        place.bases,
        rows,
        note_of(rows.device, place.total),
        rows.numel(),
        place.total,
        EVERY=values.shape[0] != 1,
        SHIFT=place.shift,
        BYTES=place.bytes,
        BEGIN=begin,
        DIM=values.shape[1],
        ROWS=height,
        COLUMNS=width,
        warps=warps_of(height * width),
    )
    check_interpreted(rows.device)


def scatter_columns(chunks: Sequence[Tensor], rows: Tensor, parts: Sequence[Tensor], begin: int) -> None:
    scatter(chunks, rows, side_by_side(parts, rows.numel()), begin)
