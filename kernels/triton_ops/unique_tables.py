"""Find the distinct ids of many tables at once, by hashing, in order of first occurrence; and positions by row.

Programs race for slots of a hash table, but what a slot holds at the end is decided by the batch alone: the smallest
position of its id and how often it occurs. A prefix sum over "is the first of its id" then gives every id its place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops.arithmetic import hash_of, mix64, unmix64
from tessera.kernels.triton_ops.faults import check_interpreted, note_of, plain_note
from tessera.kernels.triton_ops.launch import block, kernel, launch, parts_of
from tessera.kernels.triton_ops.merge import positions_by_row
from tessera.kernels.triton_ops.record_plan import bits_of, table_of

# The hash table, int32 [places, size], all -1 at first: a position that has the slot's id; n less its smallest
# position; how many positions it has, less one; and where counts are summed their sum less one, int64. Behind it the
# slot of each position, [n].
_OWNER, _FIRST, _COUNT, _SUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


class _How(NamedTuple):
    """What is made of ids and counts, as a constant of kernels. places: of the hash table, in int32."""

    mixes: bool
    unmixes: bool
    sums: bool
    ordered: bool
    places: int


class _Asked(NamedTuple):
    ids: Tensor
    bounds: Tensor
    counts: Tensor
    slots: Tensor
    note: Tensor


@triton.jit
def _sums_in(slots, total):
    """Return where the sums of counts lie in the hash table."""
    return (slots + _SUM * total).to(tl.pointer_type(tl.int64), bitcast=True)


@kernel
def _unique_insert_kernel(given, count, tables, total, HOW: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Find the slot of each position's id in a hash table of `total` slots, a power of two."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    table, begin, end, _ = table_of(given, at, inside, tables, BITS)
    id_ = tl.load(given.ids + at, mask=inside, other=0)
    hash = hash_of(id_) ^ mix64(table.to(tl.uint64, bitcast=True))
    mask = (total - 1).to(tl.int64)
    slot = hash.to(tl.int64, bitcast=True) & mask
    owners = given.slots + _OWNER * total
    if HOW.sums:
        more = tl.load(given.counts + at, mask=inside, other=0).to(tl.int64)
    active, turns = inside, 0
    while (turns < total) & (tl.max(active.to(tl.int32), axis=0) > 0):
        owner = tl.load(owners + slot, mask=active, other=0)  # may be out of date: the swap decides
        wants = active & (owner < 0)
        if tl.max(wants.to(tl.int32), axis=0) > 0:
            # Every lane takes part. One that wants no slot compares with -2, which no slot holds.
            asked = tl.where(wants, -1, -2).to(tl.int32)
            old = tl.atomic_cas(owners + slot, asked, tl.where(wants, at, -2).to(tl.int32))
            owner = tl.where(wants, tl.where(old == -1, at.to(tl.int32), old), owner)
        position = tl.maximum(owner, 0).to(tl.int64)
        other = tl.load(given.ids + position, mask=active, other=0)
        same = active & (other == id_) & (position >= begin) & (position < end)
        tl.store(given.slots + HOW.places * total + at, slot.to(tl.int32), mask=same)
        tl.atomic_max(given.slots + _FIRST * total + slot, (count - at).to(tl.int32), mask=same, sem="relaxed")
        one = tl.full(at.shape, 1, tl.int32)
        tl.atomic_add(given.slots + _COUNT * total + slot, one, mask=same, sem="relaxed")
        if HOW.sums:
            tl.atomic_add(_sums_in(given.slots, total) + slot, more, mask=same, sem="relaxed")
        active = active & ~same
        slot = tl.where(active, (slot + 1) & mask, slot)
        turns += 1


@kernel
def _unique_first_kernel(slots, firsts, count, total, HOW: tl.constexpr, BLOCK: tl.constexpr):
    """Note which positions are the first of their ids."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + HOW.places * total + at, mask=at < count, other=0)
    first = count - tl.load(slots + _FIRST * total + slot, mask=at < count, other=0)
    tl.store(firsts + at, (first == at).to(tl.int32), mask=at < count)


class _Found(NamedTuple):
    ids: Tensor
    bounds: Tensor
    order: Tensor
    slots: Tensor
    ranks: Tensor
    unique: Tensor
    inverse: Tensor
    counts: Tensor
    ends: Tensor
    sums: Tensor


@kernel
def _unique_write_kernel(given, count, tables, total, limit, HOW: tl.constexpr, BLOCK: tl.constexpr):
    """Write what was found; zeros from the number of distinct ids on up to `limit`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    slot = tl.load(given.slots + HOW.places * total + at, mask=inside, other=0)
    first = count - tl.load(given.slots + _FIRST * total + slot, mask=inside, other=0)
    place = tl.load(given.ranks + first, mask=inside, other=1).to(tl.int64) - 1
    to = tl.load(given.order + at, mask=inside, other=0) if HOW.ordered else at
    tl.store(given.inverse + to, place, mask=inside)
    is_first = inside & (first == at)
    id_ = tl.load(given.ids + at, mask=is_first, other=0)
    if HOW.mixes:
        id_ = mix64(id_.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True)
    if HOW.unmixes:
        id_ = unmix64(id_.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True)
    tl.store(given.unique + place, id_, mask=is_first)
    often = tl.load(given.slots + _COUNT * total + slot, mask=is_first, other=0) + 1
    tl.store(given.counts + place, often.to(tl.int64), mask=is_first)
    zero, beyond = tl.zeros_like(at), (at >= tl.load(given.ranks + count - 1)) & (at < limit)
    tl.store(given.unique + at, zero, mask=beyond)
    tl.store(given.counts + at, zero, mask=beyond)
    if HOW.sums:
        sum = tl.load(_sums_in(given.slots, total) + slot, mask=is_first, other=0) + 1
        tl.store(given.sums + place, sum, mask=is_first)
        tl.store(given.sums + at, zero, mask=beyond)
    begin = tl.load(given.bounds + at, mask=at <= tables, other=0)
    begin = tl.minimum(begin, count)
    before = tl.load(given.ranks + begin - 1, mask=(at <= tables) & (begin > 0), other=0)
    tl.store(given.ends + at, before.to(tl.int64), mask=at <= tables)


def unique_tables(ids: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _unique(ids, bounds, _HOW, padded=False)[:4]


def unique_padded(ids: Tensor, bounds: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `unique_tables` does without waiting for how many there are: `unique` and `counts` are int64 [n],
    zeros from the last bound on. mixed: `unique` is mixed."""
    return _unique(ids, bounds, _HOW._replace(mixes=mixed), padded=True)[:4]


def merge_look_ups(
    ids: Tensor, bounds: Tensor, counts: Tensor | None, order: Tensor | None, *, mixed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `unique.merge_look_ups` does, padded."""
    sums = counts is not None
    how = _How(mixes=False, unmixes=mixed, sums=sums, ordered=order is not None, places=5 if sums else 3)
    return _unique(ids, bounds, how, counts, order, padded=True)


_HOW = _How(mixes=False, unmixes=False, sums=False, ordered=False, places=3)


def _unique(
    ids: Tensor,
    bounds: Tensor,
    how: _How,
    given: Tensor | None = None,
    order: Tensor | None = None,
    *,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (unique, inverse, counts, bounds of unique, sums of the counts given)."""
    ids, bounds, n, device = ids.contiguous(), bounds.contiguous(), ids.numel(), ids.device
    if n == 0:
        none = torch.empty_like(ids)
        return none, none, none, torch.zeros_like(bounds), none
    assert n < 1 << 30, n  # positions and slots are numbers of 32 bits
    size, tables = triton.next_power_of_2(2 * n), bounds.numel() - 1
    slots = torch.full((how.places * size + n,), -1, dtype=torch.int32, device=device)
    firsts = torch.empty(n, dtype=torch.int32, device=device)
    asked = _Asked(ids, bounds, ids if given is None else given.contiguous(), slots, plain_note(device))
    bits = bits_of(tables)
    launch(_unique_insert_kernel, _programs(n), asked, n, tables, size, HOW=how, BITS=bits, BLOCK=block())
    launch(_unique_first_kernel, _programs(n), slots, firsts, n, size, HOW=how, BLOCK=block())
    ranks = firsts.cumsum(0, dtype=torch.int32)
    many = n if padded else int(ranks[-1])  # the one place where the host waits
    unique, inverse, counts, ends, sums = parts_of(device, many, n, many, tables + 1, many if how.sums else 0)
    found = _Found(ids, bounds, ids if order is None else order, slots, ranks, unique, inverse, counts, ends, sums)
    programs = _programs(max(n, tables + 1))
    launch(_unique_write_kernel, programs, found, n, tables, size, many, HOW=how, BLOCK=block())
    check_interpreted(device)
    return unique, inverse, counts, ends, sums


def _programs(count: int) -> int:
    return -(-count // block())


def positions_of(inverse: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    rows, device = counts.numel(), inverse.device
    if not inverse.numel():
        return torch.empty_like(inverse), counts.new_zeros(rows + 1)
    found = positions_by_row(inverse, rows, note_of(device, 0, rows))
    check_interpreted(device)
    return found
