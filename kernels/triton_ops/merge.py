"""Sums of gradients by row, in an order that the batch alone decides: no atomic addition.

Positions are sorted by row (a stable sort, so a row's positions stay in order of the batch). A row of PIECE positions
or fewer is summed in order by the program that updates it. A longer list is cut into pieces of PIECE positions, summed
by programs of their own; the row's program then sums the pieces in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops.faults import known_positions
from tessera.kernels.triton_ops.launch import block, kernel, launch, tile, warps_of

PIECE = 64
TURN = tl.constexpr(4)  # gradients asked for before the first is added


class Gradients(NamedTuple):
    """grads float32 [n, dim]; of row r the positions order[begins[r]:begins[r + 1]], or, where there are more than
    PIECE, the sums [ends[r - 1], ends[r]). Without an inverse only grads is used."""

    grads: Tensor
    order: Tensor
    begins: Tensor
    ends: Tensor
    sums: Tensor


class Summing(NamedTuple):
    """How gradients are summed, as a constant of kernels."""

    direct: bool  # no inverse: gradient r belongs to row r
    long: bool  # there may be rows of more than `piece` positions
    piece: int = PIECE


class Merge(NamedTuple):
    """Gradients by row, and how they are summed."""

    grads: Gradients
    how: Summing


@triton.jit
def below(sorted, begin, end, value, turns):
    """Return the first place of sorted[begin:end] whose element is not less than `value`; turns: `turns_of` as many."""
    for _ in range(0, turns):
        middle = (begin + end) // 2
        less = (begin < end) & (tl.load(sorted + middle, mask=begin < end, other=0) < value)
        end = tl.where(less, end, middle)
        begin = tl.where(less, middle + 1, begin)
    return begin


def turns_of(count: int) -> int:
    """Return how often a search halves so many elements."""
    return count.bit_length()


@kernel
def _piece_kernel(given, count, pieces, turns, PIECE: tl.constexpr, TILE: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64) * TILE.rows + tl.arange(0, TILE.rows)
    zero = tl.zeros_like(piece)
    owner = below(given.ends, zero, zero + count, piece + 1, turns)
    inside = owner < count
    first = tl.load(given.begins + owner, mask=inside, other=0)
    last = tl.load(given.begins + owner + 1, mask=inside, other=0)
    number = piece - (tl.load(given.ends + owner, mask=inside, other=0) - (last - first + PIECE - 1) // PIECE)
    begin = tl.where(inside, first + number * PIECE, 0)  # within the positions, for loads without a mask
    length = tl.where(inside, tl.minimum(last - begin, PIECE), 0)
    total = _summed(given.grads, given.order, begin, length, ORDERED=True, TILE=TILE)
    column = tl.arange(0, TILE.columns)[None, :]
    tl.store(given.sums + piece[:, None] * TILE.dim + column, total, mask=inside[:, None] & (column < TILE.dim))


@triton.jit
def _summed(
    source,
    order,
    begin,
    length,
    ORDERED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum rows of `source`: [begin, begin + length), or what `order` has there; begin and length int64 [ROWS]."""
    column = tl.arange(0, TILE.columns)[None, :]
    total = tl.full([TILE.rows, TILE.columns], 0.0, tl.float32)
    for j in range(0, tl.max(length, axis=0), TURN):
        for k in tl.static_range(TURN):
            # Beyond the end the last one is read again and not added: a load without a mask. So begin must be a
            # position (or the end of all) for every row, also for one of length 0.
            at = tl.maximum(begin + tl.minimum(j + k, length - 1), 0)
            if ORDERED:
                at = tl.load(order + at)
            mask = (j + k < length)[:, None] & (column < TILE.dim)
            total += tl.load(source + at[:, None] * TILE.dim + column, mask=mask, other=0.0)
    return total


@triton.jit
def merged(given, row, inside, SUM: tl.constexpr, TILE: tl.constexpr):
    """Return the merged gradients of places `row` [ROWS] among the batch's rows: float32 [ROWS, COLUMNS]."""
    column = tl.arange(0, TILE.columns)[None, :]
    if SUM.direct:
        mask = inside[:, None] & (column < TILE.dim)
        return tl.load(given.grads + row[:, None] * TILE.dim + column, mask=mask, other=0.0)
    begin = tl.load(given.begins + row, mask=inside, other=0)
    length = tl.load(given.begins + row + 1, mask=inside, other=0) - begin
    if not SUM.long:
        return _summed(given.grads, given.order, begin, length, ORDERED=True, TILE=TILE)
    long = length > SUM.piece
    pieces = tl.where(long, (length + SUM.piece - 1) // SUM.piece, 0)
    first = tl.load(given.ends + row, mask=inside, other=0) - pieces
    total = _summed(given.grads, given.order, begin, tl.where(long, 0, length), ORDERED=True, TILE=TILE)
    return total + _summed(given.sums, given.order, first, pieces, ORDERED=False, TILE=TILE)


@kernel
def _narrow_kernel(inverse, narrow, positions, count, BLOCK: tl.constexpr):
    """Half the bytes of int64 are half the passes of the sort; what is out of range stays so."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(inverse + at, mask=at < positions, other=0)
    tl.store(narrow + at, tl.minimum(tl.maximum(row, -1), count).to(tl.int32), mask=at < positions)


class _Lists(NamedTuple):
    ordered: Tensor
    begins: Tensor
    pieces: Tensor
    note: Tensor


@kernel
def _lists_kernel(given, positions, count, turns, PIECE: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr):
    """Write where the sorted positions of each row begin and, of those with more than PIECE, how many pieces they make;
    note rows out of range, which are the first or the last."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros_like(row)
    begin = below(given.ordered, zero, zero + positions, row, turns)
    tl.store(given.begins + row, begin, mask=row <= count)
    if LONG:
        length = below(given.ordered, zero, zero + positions, row + 1, turns) - begin
        pieces = tl.where(length > PIECE, (length + PIECE - 1) // PIECE, 0)
        tl.store(given.pieces + row, pieces, mask=row < count)
    if tl.program_id(0) == 0:
        ends = tl.arange(0, 2) * (positions - 1)
        known_positions(tl.load(given.ordered + ends).to(tl.int64), ends >= 0, count, given.note)


def positions_by_row(inverse: Tensor, count: int, note: Tensor, pieces: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (order int64 [n], begins int64 [count + 1]): `inverse` is r at order[begins[r]:begins[r + 1]], ascending.
    inverse: int64 [n], n > 0; what is not in [0, count) is noted. pieces: int64 [count], takes how many pieces
    each row's positions make."""
    n, device, long = inverse.numel(), inverse.device, pieces is not None
    narrow = torch.empty(n, dtype=torch.int32, device=device)
    launch(_narrow_kernel, -(-n // block()), inverse.contiguous(), narrow, n, count, BLOCK=block())
    ordered, order = torch.sort(narrow, stable=True)
    begins = torch.empty(count + 1, dtype=torch.int64, device=device)
    lists, programs = _Lists(ordered, begins, begins if pieces is None else pieces, note), -(-(count + 1) // block())
    launch(_lists_kernel, programs, lists, n, count, turns_of(n), PIECE=PIECE, LONG=long, BLOCK=block())
    return order, begins


def merge(grads: Tensor, inverse: Tensor | None, count: int, note: Tensor) -> Merge:
    """Prepare the sums of gradients float32 [n, dim] for `count` rows; `merged` takes the result."""
    grads = grads.contiguous()
    n, dim = grads.shape
    if inverse is None or n == 0 or count == 0:
        none = grads if inverse is None else grads.new_zeros((count, dim))
        return Merge(Gradients(none, note, note, note, none), Summing(direct=True, long=False))
    of_rows = torch.empty(count, dtype=torch.int64, device=grads.device) if n > PIECE else None
    order, begins = positions_by_row(inverse, count, note, of_rows)
    if of_rows is None:
        return Merge(Gradients(grads, order, begins, begins, grads), Summing(direct=False, long=False))
    ends = of_rows.cumsum(0)
    pieces = 2 * n // PIECE  # at most: more than PIECE positions make fewer than 2 / PIECE pieces each
    given, shape = Gradients(grads, order, begins, ends, torch.empty((pieces, dim), device=grads.device)), tile(dim)
    programs, turns = -(-pieces // shape.rows), turns_of(count)
    launch(_piece_kernel, programs, given, count, pieces, turns, PIECE=PIECE, TILE=shape, warps=warps_of(shape))
    return Merge(given, Summing(direct=False, long=True))
