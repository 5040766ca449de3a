"""Write and read messages of ids. Orders come from stable sorts of owners or kinds and from searches in sums of what
headers say; nothing is counted by atomic addition, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.message_layout import FIXED, MessageLayout, layout_of
from tessera.kernels.reference.message import WHOLE
from tessera.kernels.triton_ops.launch import block, kernel, launch
from tessera.kernels.triton_ops.merge import below, turns_of

_FIXED = tl.constexpr(FIXED)
_COLUMNS = 3  # beside the ids, that a kernel takes


class _Shape(NamedTuple):
    """What kernels know of a layout when they are compiled. sizes: of ids and of what goes with them, bytes; before:
    bytes of an id's columns before each; units: int32 in a row of what came late, first: before each."""

    sizes: tuple[int, ...]
    before: tuple[int, ...]
    units: int
    first: tuple[int, ...]
    columns: int
    numbered: bool
    number: int


def _shape(layout: MessageLayout) -> _Shape:
    sizes, units = layout.columns, layout.late_units
    before = tuple(sum(sizes[:place]) for place in range(len(sizes)))
    first = tuple(sum(units[:place]) for place in range(len(sizes)))
    return _Shape(sizes, before, sum(units), first, len(layout.sizes), layout.numbered, len(sizes) - 1)


@kernel
def _owner_kernel(
    ids, bounds, owners, count, kinds, RANKS: tl.constexpr, WORLD: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr
):
    """Write which rank each id goes to; RANKS, none, for what lies behind the ids of all kinds."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(ids + at, mask=at < count, other=0).to(tl.uint64, bitcast=True)
    owner = (bits % tl.full([BLOCK], WORLD, tl.uint64)).to(tl.int64) // EACH % RANKS
    owner = tl.where(at < tl.load(bounds + kinds), owner, RANKS)
    tl.store(owners + at, owner.to(tl.int32), mask=at < count)


@kernel
def _begins_kernel(ordered, begins, count, ranks, turns, BLOCK: tl.constexpr):
    rank = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros_like(rank)
    tl.store(begins + rank, below(ordered, zero, zero + count, rank, turns), mask=rank <= ranks)


class _Packed(NamedTuple):
    ids: Tensor
    bounds: Tensor
    told: Tensor
    ordered: Tensor
    order: Tensor
    begins: Tensor
    first: Tensor
    second: Tensor
    third: Tensor
    message: Tensor
    places: Tensor
    parts: Tensor


@triton.jit
def _write(column, message, at, place, id_place, mask):
    """Write a column's elements into what has room for it from words `at` on."""
    to = (message + at).to(column.dtype, bitcast=True)
    tl.store(to + place, tl.load(column + id_place, mask=mask), mask=mask)


@kernel
def _pack_kernel(
    given, count, ranks, kinds, told, room, header, words, turns, SHAPE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(given.begins + ranks)  # of ids that go to a rank
    inside = at < total
    id_place = tl.load(given.order + at, mask=at < count, other=0)
    rank = tl.load(given.ordered + at, mask=inside, other=0).to(tl.int64)
    place = at - tl.load(given.begins + rank, mask=inside, other=0)
    tl.store(given.places + id_place, tl.where(inside, at, 0), mask=at < count)
    fits = inside & (place < room)
    row = rank * words + header
    _write(given.ids, given.message, row, place, id_place, fits)
    if SHAPE.columns > 0:
        _write(given.first, given.message, row + room * SHAPE.before[1] // 8, place, id_place, fits)
    if SHAPE.columns > 1:
        _write(given.second, given.message, row + room * SHAPE.before[2] // 8, place, id_place, fits)
    if SHAPE.columns > 2:
        _write(given.third, given.message, row + room * SHAPE.before[3] // 8, place, id_place, fits)
    zero = tl.zeros_like(at)
    if SHAPE.numbered:
        kind = below(given.bounds, zero + 1, zero + kinds + 1, id_place + 1, turns) - 1
        begin = given.message + row + room * SHAPE.before[SHAPE.number] // 8
        if SHAPE.sizes[SHAPE.number] == 2:
            tl.store(begin.to(tl.pointer_type(tl.int16), bitcast=True) + place, kind.to(tl.int16), mask=fits)
        else:
            tl.store(begin.to(tl.pointer_type(tl.int32), bitcast=True) + place, kind.to(tl.int32), mask=fits)
    else:
        of, kind = at // kinds, at % kinds
        counted = of < ranks
        begin = tl.load(given.begins + of, mask=counted, other=0)
        end = tl.load(given.begins + of + 1, mask=counted, other=0)
        last = tl.load(given.bounds + kind + 1, mask=counted, other=0)
        ends = (below(given.order, begin, end, last, turns) - begin).to(tl.int32)
        to_ends = (given.message + of * words + _FIXED + told).to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(to_ends + kind, ends, mask=counted)
    if tl.program_id(0) * BLOCK < ranks:
        is_rank = at < ranks
        largest = zero
        for first in range(0, ranks, BLOCK):
            other = first + tl.arange(0, BLOCK).to(tl.int64)
            behind = tl.load(given.begins + other + 1, mask=other < ranks, other=0)
            lengths = behind - tl.load(given.begins + other, mask=other < ranks, other=0)
            largest = tl.maximum(largest, tl.max(lengths, axis=0))
        part = tl.load(given.begins + at + 1, mask=is_rank, other=0)
        part -= tl.load(given.begins + at, mask=is_rank, other=0)
        tl.store(given.parts + at, part, mask=is_rank)
        to = given.message + at * words
        tl.store(to, part, mask=is_rank)
        tl.store(to + 1, zero + total, mask=is_rank)
        tl.store(to + 2, largest, mask=is_rank)
        for number in range(0, told):
            value = tl.load(given.told + number).to(tl.int64, bitcast=True)
            tl.store(to + _FIXED + number, zero + value, mask=is_rank)


def pack_ids(
    ids: Tensor,
    bounds: Tensor,
    columns: Sequence[Tensor],
    told: Tensor,
    owners: Sequence[int],
    layout: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, n, (ranks, world, each) = layout_of(layout), ids.numel(), owners
    assert len(columns) <= _COLUMNS, len(columns)
    ids, device = ids.contiguous(), ids.device
    message = torch.empty((ranks, shape.words), dtype=torch.int64, device=device)
    of_ids = torch.empty(n, dtype=torch.int32, device=device)
    bounds = bounds.contiguous()
    how = {"RANKS": ranks, "WORLD": world, "EACH": each, "BLOCK": block()}
    launch(_owner_kernel, _programs(n), ids, bounds, of_ids, n, shape.kinds, **how)
    ordered, order = torch.sort(of_ids, stable=True)
    begins = torch.empty(ranks + 1, dtype=torch.int64, device=device)
    launch(_begins_kernel, _programs(ranks + 1), ordered, begins, n, ranks, turns_of(n), BLOCK=block())
    places, parts = torch.empty_like(ids), torch.empty(ranks, dtype=torch.int64, device=device)
    first, second, third = [*(column.contiguous() for column in columns), ids, ids, ids][:_COLUMNS]
    by_owner = ordered, order, begins
    given = _Packed(ids, bounds, told, *by_owner, first, second, third, message, places, parts)
    programs = _programs(max(n, ranks if shape.numbered else ranks * shape.kinds))
    sizes = (n, ranks, shape.kinds, shape.told, shape.room, shape.header, shape.words, turns_of(max(n, shape.kinds)))
    launch(_pack_kernel, programs, given, *sizes, SHAPE=_shape(shape), BLOCK=block())
    return message, order, places, parts


@kernel
def _lengths_kernel(message, lengths, ranks, kinds, told, room, words, NUMBERED: tl.constexpr, BLOCK: tl.constexpr):
    """Write how many ids came from each rank, how many of them late, and how many are of each kind from each rank."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(message + at * words, mask=at < ranks, other=0)
    tl.store(lengths + at, part, mask=at < ranks)
    tl.store(lengths + ranks + at, tl.maximum(part - room, 0), mask=at < ranks)
    if not NUMBERED:
        kind, rank, inside = at // ranks, at % ranks, at < kinds * ranks
        ends = (message + rank * words + _FIXED + told).to(tl.pointer_type(tl.int32), bitcast=True) + kind
        before = tl.load(ends - 1, mask=inside & (kind > 0), other=0)
        tl.store(lengths + 2 * ranks + at, (tl.load(ends, mask=inside, other=0) - before).to(tl.int64), mask=inside)


class _Came(NamedTuple):
    message: Tensor
    late: Tensor
    sums: Tensor
    kinds: Tensor
    sorted: Tensor
    order: Tensor
    ids: Tensor
    arrival: Tensor
    ranks: Tensor
    bounds: Tensor
    first: Tensor
    second: Tensor
    third: Tensor


@triton.jit
def _taken(given, out, column: tl.constexpr, rank, place, row, mask, room, header, words, SHAPE: tl.constexpr):
    """Return what came in a column from `rank` at `place`, as an element of `out`; row: among those that came late."""
    begin = given.message + rank * words + header + room * SHAPE.before[column] // 8
    soon = mask & (place < room)
    value = tl.load(begin.to(out.dtype, bitcast=True) + place, mask=soon, other=0)
    behind = mask & (place >= room)
    unit = given.late + row * SHAPE.units + SHAPE.first[column]
    low = tl.load(unit, mask=behind, other=0).to(tl.int64)
    if SHAPE.sizes[column] == 8:
        high = tl.load(unit + 1, mask=behind, other=0).to(tl.int64)
        low = (low & 0xFFFFFFFF) | (high << 32)
    return tl.where(behind, low.to(value.dtype), value)


@triton.jit
def _place_of(given, arrival, ranks, turns):
    """Return (rank, place in what it sent) of ids in the order in which they came."""
    zero = tl.zeros_like(arrival)
    rank = below(given.sums, zero, zero + ranks, arrival + 1, turns)
    rank = tl.minimum(rank, ranks - 1)
    return rank, arrival - tl.load(given.sums + rank - 1, mask=rank > 0, other=0)


@triton.jit
def _row_of(given, rank, place, count, ranks, room):
    before = tl.load(given.sums + ranks + rank - 1)  # those of all ranks, and late ones of the ranks before
    return before - count + place - room


@kernel
def _kinds_kernel(given, count, ranks, room, header, words, turns, SHAPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    rank, place = _place_of(given, tl.where(inside, at, 0), ranks, turns)
    row = _row_of(given, rank, place, count, ranks, room)
    kind = _taken(given, given.kinds, SHAPE.number, rank, place, row, inside, room, header, words, SHAPE)
    tl.store(given.kinds + at, kind, mask=inside)


@kernel
def _read_kernel(
    given, count, ranks, kinds, told, room, header, words, turns, SHAPE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, is_bound, zero = at < count, at <= kinds, tl.zeros_like(at)
    if SHAPE.numbered:
        arrival = tl.load(given.order + at, mask=inside, other=0)
        rank, place = _place_of(given, arrival, ranks, turns)
        tl.store(given.bounds + at, below(given.sorted, zero, zero + count, at, turns), mask=is_bound)
    else:
        sums = given.sums + 2 * ranks
        base = tl.load(sums - 1)
        most = zero + ranks * kinds
        both = tl.minimum(below(sums, zero, most, at + base + 1, turns), most - 1)  # of kind and rank
        kind, rank = both // ranks, both % ranks
        place = at - (tl.load(sums + both - 1) - base)
        ends = (given.message + rank * words + _FIXED + told).to(tl.pointer_type(tl.int32), bitcast=True)
        place += tl.load(ends + kind - 1, mask=kind > 0, other=0).to(tl.int64)
        arrival = place + tl.load(given.sums + rank - 1, mask=rank > 0, other=0)
        tl.store(given.bounds + at, tl.load(sums + at * ranks - 1, mask=is_bound, other=0) - base, mask=is_bound)
    row = _row_of(given, rank, place, count, ranks, room)
    tl.store(given.arrival + at, arrival, mask=inside)
    tl.store(given.ranks + at, rank, mask=inside)
    found = _taken(given, given.ids, 0, rank, place, row, inside, room, header, words, SHAPE)
    tl.store(given.ids + at, found, mask=inside)
    if SHAPE.columns > 0:
        one = _taken(given, given.first, 1, rank, place, row, inside, room, header, words, SHAPE)
        tl.store(given.first + at, one, mask=inside)
    if SHAPE.columns > 1:
        two = _taken(given, given.second, 2, rank, place, row, inside, room, header, words, SHAPE)
        tl.store(given.second + at, two, mask=inside)
    if SHAPE.columns > 2:
        three = _taken(given, given.third, 3, rank, place, row, inside, room, header, words, SHAPE)
        tl.store(given.third + at, three, mask=inside)


def read_ids(message: Tensor, late: Tensor, count: int, layout: Sequence[int]) -> list[Tensor]:
    shape, ranks, device = layout_of(layout), message.shape[0], message.device
    message, late = message.contiguous(), late.contiguous()
    parts = 0 if shape.numbered else ranks * shape.kinds
    lengths = torch.empty(2 * ranks + parts, dtype=torch.int64, device=device)
    sizes = (ranks, shape.kinds, shape.told, shape.room, shape.words)
    programs = _programs(max(ranks, parts))
    launch(_lengths_kernel, programs, message, lengths, *sizes, NUMBERED=shape.numbered, BLOCK=block())
    sums = lengths.cumsum(0)
    ids, arrival, from_ranks = torch.empty((3, count), dtype=torch.int64, device=device).unbind()
    bounds = torch.empty(shape.kinds + 1, dtype=torch.int64, device=device)
    columns = [torch.empty(count, dtype=WHOLE[size], device=device) for size in shape.sizes]
    first, second, third = [*columns, ids, ids, ids][:_COLUMNS]
    given = _Came(message, late, sums, ids, ids, ids, ids, arrival, from_ranks, bounds, first, second, third)
    more = shape.room, shape.header, shape.words, turns_of(max(count, len(lengths)))
    if shape.numbered:
        kinds = torch.empty(count, dtype=WHOLE[shape.number_bytes], device=device)
        given = given._replace(kinds=kinds)
        launch(_kinds_kernel, _programs(count), given, count, ranks, *more, SHAPE=_shape(shape), BLOCK=block())
        ordered, order = torch.sort(kinds, stable=True)
        given = given._replace(sorted=ordered, order=order)
    programs, numbers = _programs(max(count, shape.kinds + 1)), (count, ranks, shape.kinds, shape.told)
    launch(_read_kernel, programs, given, *numbers, *more, SHAPE=_shape(shape), BLOCK=block())
    return [ids, bounds, arrival, from_ranks, *columns]


def _programs(count: int) -> int:
    return -(-count // block())
