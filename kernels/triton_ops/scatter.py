"""Write rows as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.reference.scatter import side_by_side
from tessera.kernels.triton_ops.arithmetic import address_of
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.rows import place_of


class _Given(NamedTuple):
    source: Tensor
    bases: Tensor
    rows: Tensor
    note: Tensor


@kernel
def _scatter_kernel(
    given,
    count,
    total,
    EVERY: tl.constexpr,
    CHUNK: tl.constexpr,
    BEGIN: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
    column = tl.arange(0, TILE.columns)[None, :]
    inside = at < count
    row = tl.load(given.rows + at, mask=inside, other=-1)
    known = known_rows(row, inside, total, given.note)
    mask = known[:, None] & (column < TILE.dim)
    first = at[:, None] * TILE.dim if EVERY else at[:, None] * 0
    value = tl.load(given.source + first + column, mask=mask, other=0)
    address = address_of(given.bases, row, known, CHUNK)[:, None]
    tl.store(address.to(given.source.dtype) + BEGIN + column, value, mask=mask)


def scatter(chunks: Sequence[Tensor], rows: Tensor, values: Tensor, begin: int) -> None:
    place = place_of(chunks, rows.device)
    rows, values = rows.contiguous(), values.contiguous()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    shape = tile(values.shape[1])
    given = _Given(values, place.bases, rows, note_of(rows.device, place.total))
    launch(
        _scatter_kernel,
        -(-rows.numel() // shape.rows),
        given,
        rows.numel(),
        place.total,
        EVERY=values.shape[0] != 1,
        CHUNK=place.chunk,
        BEGIN=begin,
        TILE=shape,
        warps=warps_of(shape),
    )
    check_interpreted(rows.device)


def scatter_columns(chunks: Sequence[Tensor], rows: Tensor, parts: Sequence[Tensor], begin: int) -> None:
    scatter(chunks, rows, side_by_side(parts, rows.numel()), begin)
