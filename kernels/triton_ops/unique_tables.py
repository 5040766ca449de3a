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

from tessera.kernels.triton_ops.arithmetic import hash_of, mix64
from tessera.kernels.triton_ops.faults import check_interpreted, note_of, plain_note
from tessera.kernels.triton_ops.launch import block, kernel, launch
from tessera.kernels.triton_ops.merge import note_range
from tessera.kernels.triton_ops.record_plan import bits_of, table_of

# The hash table, int32 [3, size], all -1 at first: a position that has the slot's id; n less its smallest position;
# how many positions it has, less one.
_OWNER, _FIRST, _COUNT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class _Asked(NamedTuple):
    ids: Tensor
    bounds: Tensor
    slots: Tensor
    slot_of: Tensor
    note: Tensor


@kernel
def _unique_insert_kernel(given, count, tables, total, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Find the slot of each position's id in a hash table of `total` slots, a power of two."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    table, begin, end, _ = table_of(given, at, inside, tables, BITS)
    id_ = tl.load(given.ids + at, mask=inside, other=0)
    hash = hash_of(id_) ^ mix64(table.to(tl.uint64, bitcast=True))
    mask = (total - 1).to(tl.int64)
    slot = hash.to(tl.int64, bitcast=True) & mask
    owners = given.slots + _OWNER * total
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
        tl.store(given.slot_of + at, slot.to(tl.int32), mask=same)
        tl.atomic_max(given.slots + _FIRST * total + slot, (count - at).to(tl.int32), mask=same, sem="relaxed")
        one = tl.full(at.shape, 1, tl.int32)
        tl.atomic_add(given.slots + _COUNT * total + slot, one, mask=same, sem="relaxed")
        active = active & ~same
        slot = tl.where(active, (slot + 1) & mask, slot)
        turns += 1


@kernel
def _unique_first_kernel(slots, slot_of, firsts, count, total, BLOCK: tl.constexpr):
    """Note which positions are the first of their ids."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_of + at, mask=at < count, other=0)
    first = count - tl.load(slots + _FIRST * total + slot, mask=at < count, other=0)
    tl.store(firsts + at, (first == at).to(tl.int32), mask=at < count)


class _Found(NamedTuple):
    ids: Tensor
    bounds: Tensor
    slots: Tensor
    slot_of: Tensor
    ranks: Tensor
    unique: Tensor
    inverse: Tensor
    counts: Tensor
    ends: Tensor


@kernel
def _unique_write_kernel(given, count, tables, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    slot = tl.load(given.slot_of + at, mask=inside, other=0)
    first = count - tl.load(given.slots + _FIRST * total + slot, mask=inside, other=0)
    place = tl.load(given.ranks + first, mask=inside, other=1).to(tl.int64) - 1
    tl.store(given.inverse + at, place, mask=inside)
    is_first = inside & (first == at)
    tl.store(given.unique + place, tl.load(given.ids + at, mask=is_first, other=0), mask=is_first)
    often = tl.load(given.slots + _COUNT * total + slot, mask=is_first, other=0) + 1
    tl.store(given.counts + place, often.to(tl.int64), mask=is_first)
    begin = tl.load(given.bounds + at, mask=at <= tables, other=0)
    begin = tl.minimum(begin, count)
    before = tl.load(given.ranks + begin - 1, mask=(at <= tables) & (begin > 0), other=0)
    tl.store(given.ends + at, before.to(tl.int64), mask=at <= tables)


def unique_tables(ids: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _unique(ids, bounds, padded=False)


def unique_padded(ids: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `unique_tables` does without waiting for how many there are: `unique` and `counts` are int64 [n],
    zeros from the last bound on."""
    return _unique(ids, bounds, padded=True)


def _unique(ids: Tensor, bounds: Tensor, *, padded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, bounds, n = ids.contiguous(), bounds.contiguous(), ids.numel()
    if n == 0:
        return ids.clone(), torch.empty_like(ids), torch.empty_like(ids), torch.zeros_like(bounds)
    assert n < 1 << 30, n  # positions and slots are numbers of 32 bits
    size, tables = triton.next_power_of_2(2 * n), bounds.numel() - 1
    slots = torch.full((3, size), -1, dtype=torch.int32, device=ids.device)
    slot_of, firsts = torch.empty((2, n), dtype=torch.int32, device=ids.device)
    note = plain_note(ids.device)
    asked = _Asked(ids, bounds, slots, slot_of, note)
    launch(_unique_insert_kernel, _programs(n), asked, n, tables, size, BITS=bits_of(tables), BLOCK=block())
    launch(_unique_first_kernel, _programs(n), slots, slot_of, firsts, n, size, BLOCK=block())
    ranks = firsts.cumsum(0, dtype=torch.int32)
    many = n if padded else int(ranks[-1])  # the one place where the host waits
    unique, counts = torch.zeros((2, many), dtype=torch.int64, device=ids.device)
    inverse, ends = torch.empty_like(ids), torch.empty_like(bounds)
    found = _Found(ids, bounds, slots, slot_of, ranks, unique, inverse, counts, ends)
    launch(_unique_write_kernel, _programs(max(n, tables + 1)), found, n, tables, size, BLOCK=block())
    check_interpreted(ids.device)
    return unique, inverse, counts, ends


def _programs(count: int) -> int:
    return -(-count // block())


def positions_of(inverse: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    begins = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, 0, out=begins[1:])
    # Half the bytes of int64 are half the passes of the sort.
    ordered, order = torch.sort(inverse.to(torch.int32), stable=True)
    if inverse.numel():
        note_range(ordered, counts.numel(), note_of(inverse.device, 0, counts.numel()))
        check_interpreted(inverse.device)
    return order, begins
