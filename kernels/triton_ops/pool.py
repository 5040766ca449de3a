"""Sums over bags of rows of one matrix, and the gradients of these sums."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops.faults import OFFSETS, check_interpreted, known_positions, note_of
from tessera.kernels.triton_ops.launch import kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.merge import below, merge, merged, turns_of

_GROUPS = 4  # that a kernel writes; the columns of more are split afterwards


class _Widths(NamedTuple):
    """Columns of the groups that sums are written to, as a constant of kernels: how many, first and width of each."""

    groups: int
    first: tuple[int, ...]
    width: tuple[int, ...]


class _Given(NamedTuple):
    out: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor
    source: Tensor
    places: Tensor
    offsets: Tensor
    weights: Tensor
    note: Tensor


@triton.jit
def _write(out, sums, place, column, inside, GROUP: tl.constexpr, WIDTHS: tl.constexpr):
    """Write the columns of a group to bags at `place` of [bags, width]."""
    own = column - WIDTHS.first[GROUP]
    mask = inside[:, None] & (own >= 0) & (own < WIDTHS.width[GROUP])
    tl.store(out + place[:, None] * WIDTHS.width[GROUP] + own, sums, mask=mask)


@kernel
def _pool_kernel(
    given,
    bags,
    positions,
    count,
    keys,
    HAS_WEIGHTS: tl.constexpr,
    WIDTHS: tl.constexpr,
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
    batch = bags // keys
    place = bag % batch * keys + bag // batch
    _write(given.out, sums, place, column, inside, 0, WIDTHS)
    if WIDTHS.groups > 1:
        _write(given.second, sums, place, column, inside, 1, WIDTHS)
    if WIDTHS.groups > 2:
        _write(given.third, sums, place, column, inside, 2, WIDTHS)
    if WIDTHS.groups > 3:
        _write(given.fourth, sums, place, column, inside, 3, WIDTHS)


def pool(
    values: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None, keys: int, widths: Sequence[int]
) -> list[Tensor]:
    (rows, dim), bags = values.shape, offsets.numel() - 1
    groups = list(widths) if len(widths) <= _GROUPS else [dim]
    out = [torch.empty((bags // keys, keys, width), device=values.device) for width in groups]
    first, second, third, fourth = [*out, *out[:1] * _GROUPS][:_GROUPS]
    given = _Given(
        first,
        second,
        third,
        fourth,
        values.contiguous(),
        index.contiguous(),
        offsets.contiguous(),
        out[0] if weights is None else weights.contiguous(),
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
        keys,
        HAS_WEIGHTS=weights is not None,
        WIDTHS=_Widths(len(groups), tuple(accumulate(groups, initial=0))[:-1], tuple(groups)),
        TILE=shape,
        warps=warps_of(shape),
    )
    check_interpreted(values.device)
    return out if len(out) == len(widths) else [group.contiguous() for group in out[0].split(list(widths), 2)]


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
