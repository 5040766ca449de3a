"""Round matrices to formats of low precision, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.formats import BITS, FORMATS, is_int, stored_columns, stored_dtype
from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.launch import Tile, kernel, launch, tile, warps_of


class _Plan(NamedTuple):
    stored: arithmetic.Stored
    has_scales: bool
    bytes: int  # of a row of the matrix
    tile: Tile


@kernel
def _quantise_kernel(
    values,
    scales,
    ids,
    out,
    count,
    stream,
    PLAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * PLAN.tile.rows + tl.arange(0, PLAN.tile.rows)
    column = tl.arange(0, PLAN.tile.columns)[None, :]
    inside = row < count
    mask = inside[:, None] & (column < PLAN.tile.dim)
    value = tl.load(values + row[:, None] * PLAN.tile.dim + column, mask=mask, other=0.0)
    scale = tl.full([PLAN.tile.rows, 1], 1.0, tl.float32)
    if PLAN.has_scales:
        scale = tl.load(scales + row, mask=inside, other=1.0)[:, None]
    key = tl.full([PLAN.tile.rows, 1], 0, tl.uint64)
    if not PLAN.stored.nearest:
        key = arithmetic.row_key(stream, tl.load(ids + row, mask=inside, other=0))[:, None]
    address = out.to(tl.int64) + row[:, None] * PLAN.bytes
    arithmetic.store_values(address, arithmetic.Cells(column, inside[:, None], mask), value, scale, key, 0, PLAN.stored)


def quantise(values: Tensor, scales: Tensor | None, format: int, ids: Tensor, stream: int, rounding: str) -> Tensor:
    name = FORMATS[format]
    values = values.contiguous()
    (count, dim), device = values.shape, values.device
    out = torch.empty((count, stored_columns(name, dim)), dtype=stored_dtype(name), device=device)
    shape = tile(dim, least=4)
    stored = arithmetic.Stored(format, BITS[name], rounding == "nearest" or name == "fp32")
    launch(
        _quantise_kernel,
        -(-count // shape.rows),
        values,
        values if scales is None else scales.contiguous(),
        ids.contiguous(),
        out.view(torch.uint8),
        count,
        stream,
        PLAN=_Plan(stored, is_int(name), out.shape[1] * out.element_size(), shape),
        warps=warps_of(shape),
    )
    return out


@kernel
def _dequantise_kernel(
    stored,
    scales,
    out,
    count,
    PLAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * PLAN.tile.rows + tl.arange(0, PLAN.tile.rows)
    column = tl.arange(0, PLAN.tile.columns)[None, :]
    inside = row < count
    mask = inside[:, None] & (column < PLAN.tile.dim)
    scale = tl.full([PLAN.tile.rows, 1], 1.0, tl.float32)
    if PLAN.has_scales:
        scale = tl.load(scales + row, mask=inside, other=1.0)[:, None]
    address = stored.to(tl.int64) + row[:, None] * PLAN.bytes
    value = arithmetic.load_values(address, column, mask, scale, PLAN.stored.format, PLAN.stored.bits)
    tl.store(out + row[:, None] * PLAN.tile.dim + column, value, mask=mask)


def dequantise(stored: Tensor, scales: Tensor | None, format: int, dim: int) -> Tensor:
    name = FORMATS[format]
    stored = stored.contiguous()
    count = stored.shape[0]
    out = torch.empty((count, dim), device=stored.device)
    shape = tile(dim, least=4)
    how = arithmetic.Stored(format, BITS[name], nearest=True)
    launch(
        _dequantise_kernel,
        -(-count // shape.rows),
        stored.view(torch.uint8),
        out if scales is None else scales.contiguous(),
        out,
        count,
        PLAN=_Plan(how, is_int(name), stored.shape[1] * stored.element_size(), shape),
        warps=warps_of(shape),
    )
    return out
