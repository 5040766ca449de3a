"""Sums over bags of rows of one matrix, and the gradients of these sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.reference.pool import columns_of_groups
from tessera.kernels.triton_ops.faults import OFFSETS, check_interpreted, known_positions, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.merge import merge, merged


class _Given(NamedTuple):
    out: Tensor
    source: Tensor
    places: Tensor
    offsets: Tensor
    weights: Tensor
    note: Tensor


@kernel
def _pool_kernel(
    given,
    bags,
    positions,
    count,
    HAS_WEIGHTS: tl.constexpr,
    TILE: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
    column = tl.arange(0, TILE.columns)[None, :]
    inside = bag < bags
    begin = tl.load(given.offsets + bag, mask=inside, other=0)
    end = tl.load(given.offsets + bag + 1, mask=inside, other=0)
    good = (begin >= 0) & (begin <= end) & (end <= positions)
    one = tl.full([TILE.rows], 1, tl.int64)
    tl.atomic_max(given.note + OFFSETS + tl.zeros_like(bag), one, mask=inside & ~good, sem="relaxed")
    length = tl.where(good, end - begin, 0)
    sums = tl.full([TILE.rows, TILE.columns], 0.0, tl.float32)
    for j in range(0, tl.max(length, axis=0)):
        within = j < length
        row = tl.load(given.places + begin + j, mask=within, other=0)
        known = known_positions(row, within, count, given.note)
        pointer = given.source + tl.where(known, row, 0)[:, None] * TILE.dim + column
        value = tl.load(pointer, mask=known[:, None] & (column < TILE.dim), other=0.0)
        if HAS_WEIGHTS:
            value = value * tl.load(given.weights + begin + j, mask=within, other=0.0)[:, None]
        sums = tl.where(within[:, None], sums + value, sums)
    tl.store(given.out + bag[:, None] * TILE.dim + column, sums, mask=inside[:, None] & (column < TILE.dim))


def pool(
    values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, keys: int, widths: Sequence[int]
) -> list[Tensor]:
    (rows, dim), bags = values.shape, offsets.numel() - 1
    out = torch.empty((bags, dim), device=values.device)
    given = _Given(
        out,
        values.contiguous(),
        index.contiguous(),
        offsets.contiguous(),
        out if weights is None else weights.contiguous(),
        note_of(values.device, rows, rows),
    )
    shape = tile(dim)
    launch(
        _pool_kernel,
        -(-bags // shape.rows),
        given,
        bags,
        index.numel(),
        rows,
        HAS_WEIGHTS=weights is not None,
        TILE=shape,
        warps=warps_of(shape),
    )
    check_interpreted(values.device)
    return columns_of_groups(out, keys, widths)


@kernel
def _merged_kernel(out, given, count, SUM: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
    column = tl.arange(0, TILE.columns)[None, :]
    inside = row < count
    total = merged(given, row, inside, SUM, TILE)
    tl.store(out + row[:, None] * TILE.dim + column, total, mask=inside[:, None] & (column < TILE.dim))


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
    shape = tile(dim)
    launch(
        _merged_kernel,
        -(-rows // shape.rows),
        out,
        parts.grads,
        rows,
        SUM=parts.how,
        TILE=shape,
        warps=warps_of(shape),
    )
    check_interpreted(flat.device)
    return out
