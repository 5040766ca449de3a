"""Queues of the coldest rows of many tables in device memory: looked at, taken from and added to without waiting.

`embedding/cold_queues.py` describes them. An entry is a row, the count that it had when it was looked at last, its
table and its heat, two numbers of which the first decides. Queued entries come first, in order of (table, heat, row);
behind them lie others, in no order. An entry without a row is of a table that is none, `tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.record_layout import ID, LAST_SEEN, TABLE, layout_of
from tessera.kernels.reference.id_map import SLOTS
from tessera.kernels.triton_ops.arithmetic import address_of, hash_of, mix64
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.id_map import segment_of, segments_of, slot_of, slots_of
from tessera.kernels.triton_ops.launch import INTERPRETED, kernel, launch
from tessera.kernels.triton_ops.record_plan import place_of_records
from tessera.kernels.triton_ops.rows import Chunk

Records = tuple[Sequence[Tensor], Sequence[int]]  # chunks, and the numbers of their layout

_BLOCK = 1 << 12 if INTERPRETED else 256
_LAST_SEEN, _ID, _TABLE = tl.constexpr(LAST_SEEN), tl.constexpr(ID), tl.constexpr(TABLE)
_TABLE_MASK, _SLOTS = tl.constexpr((1 << 32) - 1), tl.constexpr(SLOTS)
# Lines of entries, int64 [5, capacity].
_ROW, _KEPT, _OF, _HEAT, _NEXT = (tl.constexpr(line) for line in range(5))
# What the host reads: others, entries touched since they were queued, entries still queued, then of each table how many
# others may be evicted and how many queued rows.
OTHERS, TOUCHED, ALIVE, TABLES = range(4)
_OTHERS, _TOUCHED, _ALIVE, _TABLES = (tl.constexpr(place) for place in range(4))


class _Plan(NamedTuple):
    chunk: Chunk
    meta_at: int
    block: int
    shift: int = 0  # segments of the smallest chunk of the map, as a shift


class _Looked(NamedTuple):
    entries: Tensor
    flags: Tensor
    others: Tensor
    limits: Tensor
    told: Tensor
    bases: Tensor
    note: Tensor


@triton.jit
def _heat(given, row, inside, total, tables, PLAN: tl.constexpr):
    """Return (table, count, heat's first number, its second, whether the row is in use and not above the bound of its
    table). given: with limits int64 [4, tables]: the bound, heat and row, and 1 where the count decides, 0 where the
    time does."""
    known = known_rows(row, inside, total, given.note)
    meta = (address_of(given.bases, row, known, PLAN.chunk) + PLAN.meta_at).to(tl.pointer_type(tl.int64))
    seen = tl.load(meta + _LAST_SEEN, mask=known, other=0)
    often = tl.load(meta + _LAST_SEEN + 1, mask=known, other=0)
    table = tl.load(meta + _TABLE, mask=known, other=0) & _TABLE_MASK
    table = tl.minimum(table, tables - 1)
    by_count = tl.load(given.limits + 3 * tables + table, mask=known, other=0) > 0
    first, second = tl.where(by_count, often, seen), tl.where(by_count, seen, often)
    most = tl.load(given.limits + table, mask=known, other=0)
    then = tl.load(given.limits + tables + table, mask=known, other=0)
    last = tl.load(given.limits + 2 * tables + table, mask=known, other=0)
    tie = (second < then) | ((second == then) & (row <= last))
    below = known & (often > 0) & ((first < most) | ((first == most) & tie))
    return table, often, first, second, below


@kernel
def _cold_look_kernel(given, count, positions, total, tables, PLAN: tl.constexpr):
    """Look at `count` entries, of which `positions` are queued; those that are free or above the bound go."""
    at = tl.program_id(0).to(tl.int64) * PLAN.block + tl.arange(0, PLAN.block)
    inside = at < count
    behind = inside & (at >= positions)
    inside = inside & ((at < positions) | (at - positions < tl.load(given.others)))
    row = tl.load(given.entries + _ROW * count + at, mask=inside, other=-1)
    before = tl.load(given.entries + _KEPT * count + at, mask=inside, other=0)
    table, often, first, second, stays = _heat(given, row, inside, total, tables, PLAN)
    touched = stays & (often != before)
    free = stays & (often == before)
    tl.store(given.entries + _ROW * count + at, tl.where(stays, row, -1), mask=at < count)
    tl.store(given.entries + _KEPT * count + at, often, mask=at < count)
    tl.store(given.entries + _OF * count + at, tl.where(stays, table, tables), mask=at < count)
    tl.store(given.entries + _HEAT * count + at, first, mask=at < count)
    tl.store(given.entries + _NEXT * count + at, second, mask=at < count)
    tl.store(given.flags + at, free.to(tl.int64) + (stays.to(tl.int64) << 32), mask=at < count)
    one = tl.full(at.shape, 1, tl.int64)
    tl.atomic_max(given.told + _TOUCHED + at * 0, one, mask=touched, sem="relaxed")
    tl.atomic_add(given.told + _TABLES + table, one, mask=free & behind, sem="relaxed")


@kernel
def _cold_sum_kernel(told, others, sums, begins, count, tables, BLOCK: tl.constexpr):
    """Write what the host reads of queued rows. sums: running sums of flags; begins: int64 [tables + 1], of each
    table's entries."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(begins + at, mask=at < tables, other=0)
    end = tl.load(begins + at + 1, mask=at < tables, other=0)
    before = tl.load(sums + begin - 1, mask=(at < tables) & (begin > 0), other=0)
    upto = tl.load(sums + end - 1, mask=(at < tables) & (end > 0), other=0)
    tl.store(told + _TABLES + tables + at, (upto - before) & 0xFFFFFFFF, mask=at < tables)
    first = at == 0
    tl.store(told + _OTHERS + at * 0, tl.load(others + at * 0), mask=first)
    alive = tl.load(sums + count - 1 + at * 0) >> 32
    tl.store(told + _ALIVE + at * 0, alive, mask=first)


class _Ordered(NamedTuple):
    entries: Tensor
    flags: Tensor
    order: Tensor
    out: Tensor
    out_flags: Tensor
    begins: Tensor


@kernel
def _cold_order_kernel(given, count, positions, pieces, tables, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy `positions` of `count` entries in order into memory for `pieces`, and find where each table's begin."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    source = tl.load(given.order + at, mask=inside, other=0)
    for line in tl.static_range(5):
        held = tl.load(given.entries + line * count + source, mask=inside, other=-1)
        if line == _OF:
            held = tl.where(inside, held, tables)
        tl.store(given.out + line * pieces + at, held, mask=at < pieces)
    tl.store(given.out_flags + at, tl.load(given.flags + source, mask=inside, other=0), mask=at < pieces)
    low = tl.zeros_like(at)  # entries of tables before `at`
    for k in tl.static_range(BITS):
        middle = low + (1 << (BITS - 1 - k))
        asked = (at <= tables) & (middle <= positions)
        entry = tl.load(given.order + middle - 1, mask=asked, other=0)
        table = tl.load(given.entries + _OF * count + entry, mask=asked, other=1 << 40)
        low = tl.where(asked & (table < at), middle, low)
    tl.store(given.begins + at, low, mask=at <= tables)


class _Taken(NamedTuple):
    entries: Tensor
    flags: Tensor
    sums: Tensor
    begins: Tensor
    wanted: Tensor
    out: Tensor
    directory: Tensor
    map_bases: Tensor
    bases: Tensor
    note: Tensor


@kernel
def _cold_take_kernel(given, count, positions, total, tables, bits, PLAN: tl.constexpr):
    """Take the first rows of each table that may go out of the queue. wanted: int64 [2, tables], how many, and where
    they stand among all; out: int64 [4, positions]: row, id, table and place in the id map of each."""
    at = tl.program_id(0).to(tl.int64) * PLAN.block + tl.arange(0, PLAN.block)
    inside = at < count
    table = tl.load(given.entries + _OF * count + at, mask=inside, other=tables)
    free = inside & (table < tables) & ((tl.load(given.flags + at, mask=inside, other=0) & 1) > 0)
    begin = tl.load(given.begins + table, mask=free, other=0)
    before = tl.load(given.sums + begin - 1, mask=free & (begin > 0), other=0)
    rank = ((tl.load(given.sums + at, mask=free, other=0) - before) & 0xFFFFFFFF) - 1
    taken = free & (rank < tl.load(given.wanted + table, mask=free, other=0))
    row = tl.load(given.entries + _ROW * count + at, mask=taken, other=-1)
    known = known_rows(row, taken, total, given.note)
    meta = (address_of(given.bases, row, known, PLAN.chunk) + PLAN.meta_at).to(tl.pointer_type(tl.int64))
    id_ = tl.load(meta + _ID, mask=known, other=0)
    hashes = hash_of(id_) ^ mix64(table.to(tl.uint64, bitcast=True))
    segment = segment_of(given.directory, hashes, known, bits)
    _, slot = slot_of(slots_of(given.map_bases, segment, known, PLAN.shift), hashes, table, known)
    out = given.out + tl.load(given.wanted + tables + table, mask=taken, other=0) + rank
    tl.store(out, row, mask=taken)
    tl.store(out + positions, id_, mask=taken)
    tl.store(out + 2 * positions, table, mask=taken)
    tl.store(out + 3 * positions, tl.where(slot < 0, -1, segment * _SLOTS + slot), mask=taken)
    tl.store(given.entries + _ROW * count + at, tl.full(at.shape, -1, tl.int64), mask=taken)


class _Added(NamedTuple):
    rows: Tensor
    entries: Tensor
    others: Tensor
    limits: Tensor
    bases: Tensor
    note: Tensor


@kernel
def _cold_add_kernel(given, count, positions, pieces, total, tables, PLAN: tl.constexpr):
    """Add rows that are not above the bound of their table to the others, behind `positions` of `pieces` entries."""
    at = tl.program_id(0).to(tl.int64) * PLAN.block + tl.arange(0, PLAN.block)
    inside = at < count
    row = tl.load(given.rows + at, mask=inside, other=-1)
    _, often, _, _, below = _heat(given, row, inside, total, tables, PLAN)
    place = positions + tl.atomic_add(given.others + at * 0, tl.full(at.shape, 1, tl.int64), mask=below, sem="relaxed")
    good = below & (place < pieces)
    tl.store(given.entries + _ROW * pieces + place, row, mask=good)
    tl.store(given.entries + _KEPT * pieces + place, often, mask=good)


class _Scanned(NamedTuple):
    counts: Tensor
    of_tables: Tensor
    out: Tensor
    limits: Tensor
    bases: Tensor
    note: Tensor


@kernel
def _cold_scan_kernel(given, count, total, tables, WRITE: tl.constexpr, PLAN: tl.constexpr):
    """Count rows [0, count) in use and not above the bound, by program and by table; or write them, ascending."""
    program = tl.program_id(0).to(tl.int64)
    at = program * PLAN.block + tl.arange(0, PLAN.block)
    table, _, _, _, below = _heat(given, at, at < count, total, tables, PLAN)
    chosen = below.to(tl.int64)
    if WRITE:
        end = tl.load(given.counts + program)
        place = end - tl.sum(chosen, axis=0) + tl.cumsum(chosen, axis=0) - 1
        tl.store(given.out + place, at, mask=below)
    else:
        tl.store(given.counts + program, tl.sum(chosen, axis=0))
        tl.atomic_add(given.of_tables + table, tl.full(at.shape, 1, tl.int64), mask=below, sem="relaxed")


def _of(records: Records, device: torch.device, shift: int = 0) -> tuple[Tensor, Tensor, int, _Plan]:
    """Return (bases, note, rows, plan)."""
    chunks, where = records[0], layout_of(records[1])
    place = place_of_records(chunks, where, device)
    plan = _Plan(place.chunk, where.meta_at, _BLOCK, shift)
    return place.bases, note_of(device, place.total), place.total, plan


def cold_look(
    records: Records, entries: Tensor, others: Tensor, queued: int, begins: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Look at entries int64 [5, n], of which `queued` are in order and others [1] more count; those that are free or
    above the bound go.

    begins: int64 [tables + 1], of each table's entries; limits: int64 [4, tables]. Returns (flags int64 [n], 1 for an
    entry that was not touched since the last look, and 2^32 for one that stays; their running sums int64 [n]; what the
    host is told, int64 [TABLES + 2 * tables]).
    """
    device, count, tables = entries.device, entries.shape[1], limits.shape[1]
    bases, note, total, plan = _of(records, device)
    flags, told = entries.new_empty(count), torch.zeros(TABLES + 2 * tables, dtype=torch.int64, device=device)
    given = _Looked(entries, flags, others, limits, told, bases, note)
    launch(_cold_look_kernel, -(-count // _BLOCK), given, count, queued, total, tables, PLAN=plan)
    check_interpreted(device)
    sums = flags.cumsum(0)
    return flags, sums, _tell(sums, others, begins, told)


def cold_tell(sums: Tensor, others: Tensor, begins: Tensor) -> Tensor:
    """Return what the host is told of entries of which all are queued, with running sums of their flags."""
    told = torch.zeros(TABLES + 2 * (begins.numel() - 1), dtype=torch.int64, device=sums.device)
    return _tell(sums, others, begins, told)


def _tell(sums: Tensor, others: Tensor, begins: Tensor, told: Tensor) -> Tensor:
    tables = begins.numel() - 1
    launch(_cold_sum_kernel, -(-tables // _BLOCK), told, others, sums, begins, sums.numel(), tables, BLOCK=_BLOCK)
    return told


def cold_order(
    entries: Tensor, flags: Tensor, order: Tensor, capacity: int, tables: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return entries in order, int64 [5, capacity], their flags and where those of each table begin, int64 [tables +
    1]. order: int64 [n] of those that stay, by table, heat and row."""
    out, out_flags = entries.new_empty((entries.shape[0], capacity)), entries.new_empty(capacity)
    given = _Ordered(entries, flags, order, out, out_flags, entries.new_empty(tables + 1))
    numbers, bits = (entries.shape[1], order.numel(), capacity, tables), order.numel().bit_length()
    launch(_cold_order_kernel, -(-max(capacity, tables + 1) // _BLOCK), given, *numbers, BITS=bits, BLOCK=_BLOCK)
    return out, out_flags, given.begins


def cold_take(
    records: Records,
    map_places: tuple[Tensor, Sequence[Tensor]],
    looked: tuple[Tensor, Tensor, Tensor, Tensor],
    wanted: Tensor,
    count: int,
) -> Tensor:
    """Take the coldest rows of tables out of the queue: int64 [4, count], row, id, table and place in the id map.

    looked: entries, flags, sums and begins, of which all entries are in order; wanted: int64 [2, tables], how many of
    each table, and the sum of those before it.
    """
    entries, (directory, map_chunks) = looked[0], map_places
    map_bases, shift = segments_of(map_chunks, entries.device)
    bases, note, total, plan = _of(records, entries.device, shift)
    out = torch.full((4, count), -1, dtype=torch.int64, device=entries.device)
    given = _Taken(*looked, wanted, out, directory, map_bases, bases, note)
    n, bits = entries.shape[1], directory.numel().bit_length() - 1
    launch(_cold_take_kernel, -(-n // _BLOCK), given, n, count, total, wanted.shape[1], bits, PLAN=plan)
    check_interpreted(entries.device)
    return out


def cold_add(records: Records, rows: Tensor, entries: Tensor, others: Tensor, queued: int, limits: Tensor) -> None:
    """Add rows int64 [k], whose records are written, to the others, where they are not above the bound."""
    bases, note, total, plan = _of(records, rows.device)
    given = _Added(rows, entries, others, limits, bases, note)
    numbers = rows.numel(), queued, entries.shape[1], total, limits.shape[1]
    launch(_cold_add_kernel, -(-rows.numel() // _BLOCK), given, *numbers, PLAN=plan)
    check_interpreted(rows.device)


def cold_scan(records: Records, limits: Tensor, end: int) -> tuple[list[int], Tensor]:
    """Return how many rows of each table in use, of rows [0, end), are not above the bound, and what `cold_list` needs
    to list them. The host waits."""
    device, tables = limits.device, limits.shape[1]
    bases, note, total, plan = _of(records, device)
    programs = -(-end // _BLOCK)
    counts = torch.empty(programs, dtype=torch.int64, device=device)
    of_tables = torch.zeros(tables, dtype=torch.int64, device=device)
    given = _Scanned(counts, of_tables, counts, limits, bases, note)
    launch(_cold_scan_kernel, programs, given, end, total, tables, WRITE=False, PLAN=plan)
    return of_tables.tolist(), counts.cumsum(0)


def cold_list(records: Records, limits: Tensor, end: int, counts: Tensor, out: Tensor) -> None:
    """Write the rows that `cold_scan` counted to out int64 [k], ascending."""
    bases, note, total, plan = _of(records, limits.device)
    given = _Scanned(counts, counts, out, limits, bases, note)
    launch(_cold_scan_kernel, counts.numel(), given, end, total, limits.shape[1], WRITE=True, PLAN=plan)
    check_interpreted(limits.device)
