"""Round matrices to formats of low precision, and back."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.formats import BITS, FORMATS, is_int, stored_columns, stored_dtype
from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of


@kernel
def _quantise_kernel(
    values,
    steps,
    ids,
    out,
    count,
    stream,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    NEAREST: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    DIM: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < count
    mask = inside[:, None] & (column < DIM)
    value = tl.load(values + row[:, None] * DIM + column, mask=mask, other=0.0)
    step = tl.full([ROWS, 1], 1.0, tl.float32)
    if HAS_STEPS:
        step = tl.load(steps + row, mask=inside, other=1.0)[:, None]
    key = tl.full([ROWS, 1], 0, tl.uint64)
    if not NEAREST:
        key = arithmetic.row_key(stream, tl.load(ids + row, mask=inside, other=0))[:, None]
    address = out.to(tl.int64) + row[:, None] * BYTES
    arithmetic.store_values(address, column, mask, value, step, key, 0, FORMAT, BITS, NEAREST, ROWS, COLUMNS)


def quantise(values: Tensor, steps: Tensor | None, format: int, ids: Tensor, stream: int, rounding: str) -> Tensor:
    name = FORMATS[format]
    values = values.contiguous()
    (count, dim), device = values.shape, values.device
    out = torch.empty((count, stored_columns(name, dim)), dtype=stored_dtype(name), device=device)
    height, width = tile(dim, least=4)
    launch(
        _quantise_kernel,
        -(-count // height),
        values,
        values if steps is None else steps.contiguous(),
        ids.contiguous(),
        out.view(torch.uint8),
        count,
        stream,
        FORMAT=format,
        BITS=BITS[name],
        NEAREST=rounding == "nearest" or name == "fp32",
        HAS_STEPS=is_int(name),
        DIM=dim,
        BYTES=out.shape[1] * out.element_size(),
        ROWS=height,
        COLUMNS=width,
        warps=warps_of(height * width),
    )
    return out


@kernel
def _dequantise_kernel(
    stored,
    steps,
    out,
    count,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    DIM: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < count
    mask = inside[:, None] & (column < DIM)
    step = tl.full([ROWS, 1], 1.0, tl.float32)
    if HAS_STEPS:
        step = tl.load(steps + row, mask=inside, other=1.0)[:, None]
    value = arithmetic.load_values(stored.to(tl.int64) + row[:, None] * BYTES, column, mask, step, FORMAT, BITS)
    tl.store(out + row[:, None] * DIM + column, value, mask=mask)


def dequantise(stored: Tensor, steps: Tensor | None, format: int, dim: int) -> Tensor:
    name = FORMATS[format]
    stored = stored.contiguous()
    count = stored.shape[0]
    out = torch.empty((count, dim), device=stored.device)
    height, width = tile(dim, least=4)
    launch(
        _dequantise_kernel,
        -(-count // height),
        stored.view(torch.uint8),
        out if steps is None else steps.contiguous(),
        out,
        count,
        FORMAT=format,
        BITS=BITS[name],
        HAS_STEPS=is_int(name),
        DIM=dim,
        BYTES=stored.shape[1] * stored.element_size(),
        ROWS=height,
        COLUMNS=width,
        warps=warps_of(height * width),
    )
    return out
