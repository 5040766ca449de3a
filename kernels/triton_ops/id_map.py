"""The id map on the state that `kernels/id_map.py` describes, in device memory.

Insertion takes distinct, unknown ids with their rows, so that row numbers never depend on a race: programs race for
slots only. A program claims the first empty slot from an id's home on by compare-and-swap of the slot's row (-1: empty;
any 64 bits may be a hash, so the hash cannot mark an empty slot) and then writes the hash, which is read only by later
kernels. Slots of a line so fill from its beginning, as the C++ version expects. Segments are split by taking their
pairs out and placing them again; `id_map_erase.py` has erasure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.host_numbers import on_device
from tessera.kernels.reference.id_map import LINE, SLOTS, TABLE_SHIFT, split_limit
from tessera.kernels.triton_ops.arithmetic import hash_of, mix64
from tessera.kernels.triton_ops.faults import note_duplicates
from tessera.kernels.triton_ops.launch import block, kernel, launch
from tessera.kernels.triton_ops.rows import blocks_of

_KEPT = "_tessera_segments"  # an attribute of the first chunk
_AT_ONCE = 256  # segments that are split at once: their pairs take 16 MiB

_SLOTS, _LINE = tl.constexpr(SLOTS), tl.constexpr(LINE)
_TABLE_SHIFT, _ROW_MASK = tl.constexpr(TABLE_SHIFT), tl.constexpr((1 << TABLE_SHIFT) - 1)
_KNOWN, _NEGATIVE = tl.constexpr(0), tl.constexpr(1)  # places of what an insertion met


@triton.jit
def segment_of(directory, hashes, inside, bits):
    """Return int64 numbers of the segments of uint64 hashes; the directory has 2^bits entries, so a shift may be by
    64."""
    entry = ((hashes >> 1) >> (63 - bits).to(tl.uint64)).to(tl.int64)
    return tl.load(directory + entry, mask=inside, other=0).to(tl.int64)


@triton.jit
def slots_of(bases, segment, inside, SHIFT: tl.constexpr):
    """Return pointers to the first words of segments; bases: addresses of blocks of 2^SHIFT segments."""
    base = tl.load(bases + (segment >> SHIFT), mask=inside, other=0)
    address = base + (segment & ((1 << SHIFT) - 1)) * (_SLOTS * 16)
    return address.to(tl.pointer_type(tl.int64))


@triton.jit
def home_of(hashes):
    return (hashes & (_SLOTS - _LINE)).to(tl.int64)


@triton.jit
def _keys(ids, tables, at, inside, WITH_TABLES: tl.constexpr):
    """Return (hashes, tables) of the keys at positions."""
    hashes = hash_of(tl.load(ids + at, mask=inside, other=0))
    table = tl.zeros_like(at)
    if WITH_TABLES:
        table = tl.load(tables + at, mask=inside, other=0)
        hashes = hashes ^ mix64(table.to(tl.uint64, bitcast=True))
    return hashes, table


@triton.jit
def slot_of(slots, hashes, table, inside):
    """Return (row, slot) of keys, -1 where unknown. A line is filled from its beginning: an empty slot ends the
    search."""
    wanted = hashes.to(tl.int64, bitcast=True)
    at = home_of(hashes)
    row = tl.full(at.shape, -1, tl.int64)
    slot = tl.full(at.shape, -1, tl.int64)
    active = inside
    turns = 0
    while (turns < _SLOTS // _LINE) & (tl.max(active.to(tl.int32), axis=0) > 0):
        last = tl.full(at.shape, -1, tl.int64)
        for k in tl.static_range(_LINE):
            pair = slots + (at + k) * 2
            held = tl.load(pair, mask=active, other=0)
            last = tl.load(pair + 1, mask=active, other=-1)
            hit = active & (held == wanted) & (last >> _TABLE_SHIFT == table)
            row = tl.where(hit, last & _ROW_MASK, row)
            slot = tl.where(hit, at + k, slot)
        active = active & (row < 0) & (last >= 0)
        at = (at + _LINE) & (_SLOTS - 1)
        turns += 1
    return row, slot


@kernel
def _find_kernel(
    ids,
    tables,
    directory,
    bases,
    rows,
    places,
    count,
    bits,
    WITH_TABLES: tl.constexpr,
    WITH_PLACES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    hashes, table = _keys(ids, tables, at, inside, WITH_TABLES)
    segment = segment_of(directory, hashes, inside, bits)
    row, slot = slot_of(slots_of(bases, segment, inside, SHIFT), hashes, table, inside)
    tl.store(rows + at, row, mask=inside)
    if WITH_PLACES:
        tl.store(places + at, tl.where(slot < 0, -1, segment * _SLOTS + slot), mask=inside)


@kernel
def _count_kernel(
    ids,
    tables,
    rows,
    directory,
    bases,
    wanted,
    met,
    count,
    bits,
    WITH_TABLES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the ids to those wanted of their segments; note ids that are known and rows out of range."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    hashes, table = _keys(ids, tables, at, inside, WITH_TABLES)
    segment = segment_of(directory, hashes, inside, bits)
    one = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_add(wanted + segment, one, mask=inside, sem="relaxed")
    found, slot = slot_of(slots_of(bases, segment, inside, SHIFT), hashes, table, inside)
    row = tl.load(rows + at, mask=inside, other=0)
    zeros = tl.zeros([BLOCK], tl.int32)
    tl.atomic_max(met + _KNOWN + zeros, one, mask=inside & (found >= 0), sem="relaxed")
    tl.atomic_max(met + _NEGATIVE + zeros, one, mask=inside & ((row < 0) | (row > _ROW_MASK)), sem="relaxed")


@kernel
def _place_kernel(
    hashes,
    tables,
    rows,
    directory,
    bases,
    count,
    bits,
    HASHED: tl.constexpr,
    WITH_TABLES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put pairs into the first empty slots from their homes on; a row below 0 is skipped. HASHED: rows have the bits of
    their tables."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.load(rows + at, mask=inside, other=-1)
    if HASHED:
        hash = tl.load(hashes + at, mask=inside, other=0).to(tl.uint64, bitcast=True)
    else:
        hash, table = _keys(hashes, tables, at, inside, WITH_TABLES)
        row = tl.where(row < 0, row, row | table << _TABLE_SHIFT)
    active = inside & (row >= 0)
    segment = segment_of(directory, hash, inside, bits)
    # Every lane takes part in a compare-and-swap. One that wants no slot needs an address that it may touch, and
    # compares with -2, which no slot holds.
    slots = slots_of(bases, segment, at >= 0, SHIFT)
    slot = home_of(hash)
    turns = 0
    while (turns < _SLOTS) & (tl.max(active.to(tl.int32), axis=0) > 0):
        pair = slots + slot * 2
        seen = tl.load(pair + 1, mask=active, other=0)  # may be out of date: the swap decides
        wants = active & (seen < 0)
        if tl.max(wants.to(tl.int32), axis=0) > 0:
            old = tl.atomic_cas(pair + 1, tl.where(wants, -1, -2).to(tl.int64), tl.where(wants, row, -2))
            won = wants & (old == -1)
            tl.store(pair, hash.to(tl.int64, bitcast=True), mask=won)
            active = active & ~won
        slot = tl.where(active, (slot + 1) & (_SLOTS - 1), slot)
        turns += 1


@kernel
def _take_out_kernel(segments, bases, hashes, rows, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the pairs of a segment and empty it; programs are blocks of the segments' slots."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    segment = tl.load(segments + at // _SLOTS)
    pair = slots_of(bases, segment, at >= 0, SHIFT) + (at % _SLOTS) * 2
    tl.store(hashes + at, tl.load(pair))
    tl.store(rows + at, tl.load(pair + 1))
    tl.debug_barrier()  # nothing of the block is emptied before all of it has been read
    tl.store(pair + 1, tl.full([BLOCK], -1, tl.int64))


class Map:
    """The state with what kernels are told of it."""

    def __init__(self, directory: Tensor, chunks: Sequence[Tensor]) -> None:
        self.directory = directory
        self.bases, self.shift = segments_of(chunks, directory.device)
        self.bits = directory.numel().bit_length() - 1

    def find(self, ids: Tensor, tables: Tensor | None, *, with_places: bool = False) -> tuple[Tensor, Tensor]:
        """Return rows and, if asked for, places: segment * SLOTS + slot, -1 where unknown."""
        ids = ids.contiguous()
        rows = torch.empty_like(ids)
        places = torch.empty_like(ids) if with_places else rows
        arguments = (ids, _or(tables, ids), self.directory, self.bases, rows, places, ids.numel(), self.bits)
        known = {"WITH_TABLES": tables is not None, "WITH_PLACES": with_places}
        launch(_find_kernel, _programs(ids.numel()), *arguments, **known, SHIFT=self.shift, BLOCK=block())
        return rows, places

    def count(self, ids: Tensor, tables: Tensor | None, rows: Tensor, wanted: Tensor, met: Tensor) -> None:
        arguments = (ids, _or(tables, ids), rows, self.directory, self.bases, wanted, met, ids.numel(), self.bits)
        launch(
            _count_kernel,
            _programs(ids.numel()),
            *arguments,
            WITH_TABLES=tables is not None,
            SHIFT=self.shift,
            BLOCK=block(),
        )

    def place(self, hashes: Tensor, tables: Tensor | None, rows: Tensor, *, hashed: bool) -> None:
        arguments = (hashes, _or(tables, hashes), rows, self.directory, self.bases, rows.numel(), self.bits)
        known = {"HASHED": hashed, "WITH_TABLES": tables is not None}
        launch(_place_kernel, _programs(rows.numel()), *arguments, **known, SHIFT=self.shift, BLOCK=block())

    def take_out(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Empty segments int64 [k]. Returns what their slots held: hashes and rows, -1 for none, int64 [k * SLOTS]."""
        hashes = torch.empty(segments.numel() * SLOTS, dtype=torch.int64, device=segments.device)
        rows = torch.empty_like(hashes)
        size = min(block(), SLOTS)
        launch(
            _take_out_kernel, hashes.numel() // size, segments, self.bases, hashes, rows, SHIFT=self.shift, BLOCK=size
        )
        return hashes, rows


def segments_of(chunks: Sequence[Tensor], device: torch.device) -> tuple[Tensor, int]:
    """Return addresses of blocks of segments as large as the first chunk, int64 on the device, and its size as a
    shift. They are sent once per growth and kept with the first chunk."""
    first, last = chunks[0], chunks[-1]
    kept = getattr(first, _KEPT, None)
    if kept is None or kept[0] != len(chunks) or kept[1] != last.data_ptr():
        blocks = blocks_of(chunks, first.shape[0])
        kept = len(chunks), last.data_ptr(), torch.tensor(blocks, dtype=torch.int64, device=device)
        setattr(first, _KEPT, kept)
    return kept[2], first.shape[0].bit_length() - 1


def _programs(count: int) -> int:
    return -(-count // block())


def _or(tables: Tensor | None, unread: Tensor) -> Tensor:
    """Return what a kernel is given where it may read no tables."""
    return unread if tables is None else tables


def same_length(ids: Tensor, tables: Tensor | None) -> Tensor | None:
    if tables is None:
        return None
    if tables.numel() != ids.numel():
        raise ValueError(f"tables: expected {ids.numel()}, found {tables.numel()}")
    return tables.contiguous()


def id_map_find(directory: Tensor, chunks: Sequence[Tensor], ids: Tensor, tables: Tensor | None) -> Tensor:
    return Map(directory, chunks).find(ids, same_length(ids, tables))[0]


def id_map_insert(
    directory: Tensor,
    chunks: Sequence[Tensor],
    segments: Tensor,
    counters: Tensor,
    ids: Tensor,
    rows: Tensor,
    tables: Tensor | None,
) -> None:
    """Insert all ids, or none where memory or a bit of the directory is missing; counters[2] tells.

    The host waits once, and once more for each round of splits.
    """
    counters[2] = 0
    found = Map(directory, chunks)
    ids, rows, tables = ids.contiguous(), rows.contiguous(), same_length(ids, tables)
    while True:
        wanted = segments[:, 1].clone()
        met = torch.zeros(2, dtype=torch.int32, device=ids.device)
        found.count(ids, tables, rows, wanted, met)
        known, negative, full = _read(found, segments, wanted, met)
        if known:
            raise ValueError("ids: expected distinct, unknown ids, found one that is already known")
        if negative:
            raise ValueError(f"rows: expected 0 to 2^{TABLE_SHIFT} - 1")
        if not full:
            break
        full = full[: segments.shape[0] - int(counters[0])]
        if not full or any(one.depth == found.bits for one in full):
            return
        _split(found, segments, counters, full)
    found.place(ids, tables, rows, hashed=False)
    note_duplicates((found.find(ids, tables)[0] != rows).any())
    segments[:, 1] = wanted
    counters[1] += ids.numel()
    counters[2] = ids.numel()


class _Full(NamedTuple):
    """A segment that is to be split; entry: its first in the directory."""

    number: int
    depth: int
    entry: int


def _read(found: Map, segments: Tensor, wanted: Tensor, met: Tensor) -> tuple[int, int, list[_Full]]:
    """Return what an insertion met, and the first `_AT_ONCE` segments that would be too full. The host waits here."""
    # Those that `id_map_place` filled beyond their limits too, though none of these ids may belong there.
    over = wanted > segments[:, 2]
    first = torch.sort(over, descending=True, stable=True)[1][:_AT_ONCE]
    entries = torch.arange(found.directory.numel(), device=over.device)
    begins = torch.full((segments.shape[0],), entries.numel(), device=over.device)
    begins.scatter_reduce_(0, found.directory.long(), entries, "amin")
    columns = first, segments[first, 0], begins[first]
    known, negative, many, *listed = torch.cat([met, over.sum()[None], *columns]).tolist()
    count = first.numel()
    of_each = zip(listed[:count], listed[count : 2 * count], listed[2 * count :], strict=True)
    return known, negative, [_Full(*one) for one in of_each][:many]


def id_map_place(directory: Tensor, chunks: Sequence[Tensor], ids: Tensor, rows: Tensor, tables: Tensor) -> None:
    """Put distinct, unknown ids into segments that have room for them."""
    found = Map(directory, chunks)
    found.place(ids.contiguous(), tables.contiguous(), rows.contiguous(), hashed=False)


def _split(found: Map, segments: Tensor, counters: Tensor, full: list[_Full]) -> None:
    """Deal each segment out to itself (next upper bit 0) and a new one (1). The host does not wait."""
    directory, device = found.directory, found.directory.device
    begin = int(counters[0])
    counters[0] += len(full)
    prefixes = [one.entry >> (found.bits - one.depth - 1) for one in full]  # depth + 1 bits, the last one 0
    limits = [split_limit(p + bit, one.depth + 1) for bit in (0, 1) for p, one in zip(prefixes, full, strict=True)]
    numbers = [*(one.number for one in full), *range(begin, begin + len(full)), *(one.depth + 1 for one in full)]
    old, new, depth, *limits_of = on_device([*numbers, *limits], device).view(5, -1)
    sibling = torch.full((segments.shape[0],), -1, device=device).scatter_(0, old, new)
    owner, entries = directory.long(), torch.arange(directory.numel(), device=device)
    upper = (entries >> (found.bits - segments[owner, 0].long() - 1).clamp(min=0)) & 1
    directory.copy_(torch.where((sibling[owner] >= 0) & (upper == 1), sibling[owner], owner))
    both = torch.cat([old, new])
    segments[both, 0] = torch.cat([depth, depth]).to(segments.dtype)
    segments[both, 2] = torch.cat(limits_of).to(segments.dtype)
    found.take_out(new)  # only to mark its slots empty
    hashes, rows = found.take_out(old)
    upper = (hashes.view(-1, SLOTS) >> (64 - depth)[:, None]) & 1
    moved = ((rows.view(-1, SLOTS) >= 0) & (upper == 1)).sum(dim=1).to(segments.dtype)
    segments[new, 1] = moved
    segments[old, 1] -= moved
    found.place(hashes, None, rows, hashed=True)
