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
from tessera.kernels.triton_ops.merge import below, merge, merged, turns_of


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


class _Spread(NamedTuple):
    out: Tensor
    grads: Tensor
    offsets: Tensor
    weights: Tensor


@kernel
def _spread_kernel(given, bags, positions, keys, turns, HAS_WEIGHTS: tl.constexpr, TILE: tl.constexpr):
    """Write the gradient of each position's row: that of its bag, times its weight; zeros where it is in none."""
    at = tl.program_id(0).to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
    column = tl.arange(0, TILE.columns)[None, :]
    zero = tl.zeros_like(at)
    bag = below(given.offsets, zero, zero + bags + 1, at + 1, turns) - 1
    inside = (at < positions) & (bag >= 0) & (bag < bags)
    bag = tl.where(inside, bag, 0)
    batch = bags // keys
    place = bag % batch * keys + bag // batch
    pointer = given.grads + place[:, None] * TILE.dim + column
    value = tl.load(pointer, mask=inside[:, None] & (column < TILE.dim), other=0.0)
    if HAS_WEIGHTS:
        value = value * tl.load(given.weights + at, mask=inside, other=0.0)[:, None]
    tl.store(given.out + at[:, None] * TILE.dim + column, value, mask=(at < positions)[:, None] & (column < TILE.dim))


def pool_backward(grads: Sequence[Tensor], index: Tensor, offsets: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    grads_bkw = torch.cat(list(grads), 2)
    (batch, keys, dim), device = grads_bkw.shape, grads_bkw.device
    bags, positions = batch * keys, index.numel()
    of_positions, shape = torch.empty((positions, dim), device=device), tile(dim)
    if bags:
        factors = grads_bkw if weights is None else weights.contiguous()
        spread = _Spread(of_positions, grads_bkw, offsets.contiguous(), factors)
        numbers = bags, positions, keys, turns_of(bags + 1)
        programs, warps = -(-positions // shape.rows), warps_of(shape)
        launch(_spread_kernel, programs, spread, *numbers, HAS_WEIGHTS=weights is not None, TILE=shape, warps=warps)
    else:
        of_positions.zero_()
    note = note_of(device, rows, rows)
    parts = merge(of_positions, index, rows, note)
    out = torch.empty((rows, dim), device=device)
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
    check_interpreted(device)
    return out
