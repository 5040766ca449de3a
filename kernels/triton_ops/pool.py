"""Sums over bags of rows of one matrix, and the gradients of these sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.reference.pool import columns_of_groups
from tessera.kernels.triton_ops.faults import OFFSETS, check_interpreted, known_positions, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.merge import PIECE, merge, merged


@kernel
def _pool_kernel(
    out,
    values,
    index,
    offsets,
    weights,
    note,
    bags,
    positions,
    count,
    HAS_WEIGHTS: tl.constexpr,
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
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in range(0, tl.max(length, axis=0)):
        within = j < length
        row = tl.load(index + begin + j, mask=within, other=0)
        known = known_positions(row, within, count, note)
        pointer = values + tl.where(known, row, 0)[:, None] * DIM + column
        value = tl.load(pointer, mask=known[:, None] & (column < DIM), other=0.0)
        if HAS_WEIGHTS:
            value = value * tl.load(weights + begin + j, mask=within, other=0.0)[:, None]
        sums = tl.where(within[:, None], sums + value, sums)
    tl.store(out + bag[:, None] * DIM + column, sums, mask=inside[:, None] & (column < DIM))


def pool(
    values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, keys: int, widths: Sequence[int]
) -> list[Tensor]:
    (rows, dim), bags = values.shape, offsets.numel() - 1
    out = torch.empty((bags, dim), device=values.device)
    height, width = tile(dim)
    launch(
        _pool_kernel,
        -(-bags // height),
        out,
        values.contiguous(),
        index.contiguous(),
        offsets.contiguous(),
        out if weights is None else weights.contiguous(),
        note_of(values.device, rows, rows),
        bags,
        index.numel(),
        rows,
        HAS_WEIGHTS=weights is not None,
        DIM=dim,
        ROWS=height,
        COLUMNS=width,
        warps=warps_of(height * width),
    )
    check_interpreted(values.device)
    return columns_of_groups(out, keys, widths)


@kernel
def _merged_kernel(
    out,
    grads,
    order,
    begins,
    ends,
    sums,
    note,
    count,
    DIRECT: tl.constexpr,
    LONG: tl.constexpr,
    PIECE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < count
    total = merged(grads, order, begins, ends, sums, row, inside, note, DIRECT, LONG, PIECE, DIM, ROWS, COLUMNS)
    tl.store(out + row[:, None] * DIM + column, total, mask=inside[:, None] & (column < DIM))


def pool_backward(grads: Sequence[Tensor], index: Tensor, offsets: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    grads_bkw = torch.cat(list(grads), 2)
    batch, keys, dim = grads_bkw.shape
    flat, bags = grads_bkw.flatten(0, 1), batch * keys
    positions = torch.arange(index.numel(), device=flat.device)
    bag = torch.searchsorted(offsets.contiguous(), positions, right=True) - 1
    inside = (bag >= 0) & (bag < bags)
    factors = inside.to(flat.dtype) if weights is None else inside * weights
    if bags:
        bag = bag.clamp(0, bags - 1)
        of_positions = flat[bag % batch * keys + bag // batch] * factors[:, None]
    else:
        of_positions = flat.new_zeros(index.numel(), dim)
    note = note_of(flat.device, rows, rows)
    parts = merge(of_positions, index, rows, note)
    out = torch.empty((rows, dim), device=flat.device)
    height, width = tile(dim)
    launch(
        _merged_kernel,
        -(-rows // height),
        out,
        parts.grads,
        parts.order,
        parts.begins,
        parts.ends,
        parts.sums,
        note,
        rows,
        DIRECT=parts.direct,
        LONG=parts.long,
        PIECE=PIECE,
        DIM=dim,
        ROWS=height,
        COLUMNS=width,
        warps=warps_of(height * width),
    )
    check_interpreted(flat.device)
    return out
