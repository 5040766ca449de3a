"""Find the records of ids of many tables, note that they were seen, and list the ids that have none; one wait at most.

Which ids are new, how many of each table, and whether the id map takes them without a split, the host learns by one
read. Rows that it then gives to them go into the map by one more kernel, for which it need not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.record_layout import LAST_SEEN, layout_of
from tessera.kernels.reference.id_map import LINE, SLOTS, TABLE_SHIFT
from tessera.kernels.triton_ops.arithmetic import address_of, hash_of, mix64
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.id_map import home_of, segment_of, segments_of, slots_of
from tessera.kernels.triton_ops.launch import INTERPRETED, kernel, launch, parts_of
from tessera.kernels.triton_ops.record_plan import bits_of, place_of_records, table_of
from tessera.kernels.triton_ops.rows import Chunk

_BLOCK = 1 << 12 if INTERPRETED else 128  # ids of a program: a line of the map is eight words of each
_SLOTS, _LINE = tl.constexpr(SLOTS), tl.constexpr(LINE)
_TABLE_SHIFT, _ROW_MASK = tl.constexpr(TABLE_SHIFT), tl.constexpr((1 << TABLE_SHIFT) - 1)
_LAST_SEEN = tl.constexpr(LAST_SEEN)
# A segment may have this many ids before it is split, more than its limit (`id_map.split_limit`): then all segments
# that are over theirs are split at once, so that of many steps with new ids few have to wait for splits.
_MOST = tl.constexpr(int(0.9 * SLOTS))
# Places of what the host reads: how many ids are new, whether a segment of the map would be too full, how many are new
# of each table.
_NEW, _OVER, _OF_TABLES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _find_in_lines(slots, hashes, table, inside):
    """Return rows int64 [BLOCK] of keys, -1 where unknown. A line of slots is loaded as a whole, in vectors of 16
    bytes; it is filled from its beginning, so an empty slot ends the search."""
    wanted = hashes.to(tl.int64, bitcast=True)
    at = home_of(hashes)
    row = tl.full(at.shape, -1, tl.int64)
    active, turns = inside, 0
    word_of = tl.arange(0, 2 * _LINE)[None, :]
    while (turns < _SLOTS // _LINE) & (tl.max(active.to(tl.int32), axis=0) > 0):
        first = tl.multiple_of((slots + at * 2)[:, None], (16, 16))
        line = tl.load(first + word_of, mask=active[:, None], other=-1)
        held, word = tl.split(tl.reshape(line, [at.shape[0], _LINE, 2]))
        hit = (held == wanted[:, None]) & (word >= 0) & (word >> _TABLE_SHIFT == table[:, None])
        row = tl.maximum(row, tl.max(tl.where(hit & active[:, None], word & _ROW_MASK, -1), axis=1))
        active = active & (row < 0) & (tl.min(word, axis=1) >= 0)
        at = (at + _LINE) & (_SLOTS - 1)
        turns += 1
    return row


class _Asked(NamedTuple):
    ids: Tensor
    bounds: Tensor
    directory: Tensor
    map_bases: Tensor
    bases: Tensor
    now: Tensor
    counts: Tensor
    rows: Tensor
    least: Tensor
    note: Tensor
    segments: Tensor  # these are for the list of new ids
    news: Tensor
    numbers: Tensor
    wanted: Tensor


class _Plan(NamedTuple):
    touch: bool
    guarded: bool  # touch only where no table has less room than none
    one_time: bool
    moment: bool  # that time is a number of the host
    has_counts: bool
    list_new: bool
    meta_at: int
    chunk: Chunk
    bits: int
    block: int
    segments: int  # of the smallest chunk of the map, as a shift


@triton.jit
def _begin_list(given, tables, segments, PLAN: tl.constexpr):
    """Let the numbers of new ids begin at zero, those wanted of segments at what these hold; a program a part."""
    first, step = tl.program_id(0) * PLAN.block, tl.num_programs(0) * PLAN.block
    zeros = tl.full([PLAN.block], 0, tl.int64)
    wanted = given.wanted.to(tl.pointer_type(tl.int32), bitcast=True)
    begin = first
    while begin < tl.maximum(segments, tables + _OF_TABLES):
        at = begin + tl.arange(0, PLAN.block).to(tl.int64)
        tl.store(given.numbers + at, zeros, mask=at < tables + _OF_TABLES)
        held = tl.load(given.segments + at * 3 + 1, mask=at < segments, other=0)
        tl.store(wanted + at, held, mask=at < segments)
        begin += step


@kernel
def _records_find_kernel(given, count, total, tables, bits, segments, moment, PLAN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * PLAN.block + tl.arange(0, PLAN.block)
    table, _, _, inside = table_of(given, at, at < count, tables, PLAN.bits)
    hashes = hash_of(tl.load(given.ids + at, mask=inside, other=0)) ^ mix64(table.to(tl.uint64, bitcast=True))
    segment = segment_of(given.directory, hashes, inside, bits)
    row = _find_in_lines(slots_of(given.map_bases, segment, inside, PLAN.segments), hashes, table, inside)
    tl.store(given.rows + at, row, mask=at < count)
    if PLAN.list_new:
        _begin_list(given, tables, segments, PLAN)
        tl.store(given.news + tl.program_id(0), tl.sum((inside & (row < 0)).to(tl.int64), axis=0))
    if PLAN.touch:
        known = known_rows(row, inside, total, given.note)
        if PLAN.guarded:
            known = known & (tl.load(given.least) >= 0)
        meta = (address_of(given.bases, row, known, PLAN.chunk) + PLAN.meta_at).to(tl.pointer_type(tl.int64))
        seen = tl.load(meta + _LAST_SEEN, mask=known, other=0)
        often = tl.load(meta + _LAST_SEEN + 1, mask=known, other=0)
        if PLAN.moment:
            time = tl.zeros_like(at) + moment
        else:
            time = tl.load(given.now + (at * 0 if PLAN.one_time else at), mask=known, other=0)
        more = tl.full([PLAN.block], 1, tl.int64)
        if PLAN.has_counts:
            more = tl.load(given.counts + at, mask=known, other=0)
        tl.store(meta + _LAST_SEEN, tl.where(often == 0, time, tl.maximum(seen, time)), mask=known)
        tl.store(meta + _LAST_SEEN + 1, often + more, mask=known)


def records_find(
    directory: Tensor,
    map_chunks: Sequence[Tensor],
    chunks: Sequence[Tensor],
    ids: Tensor,
    bounds: Tensor,
    now: Tensor | None,
    counts: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    rows = torch.empty(ids.numel(), dtype=torch.int64, device=ids.device)
    _find((directory, map_chunks), chunks, _Batch(ids, bounds, now, counts), layout, _Out(rows))
    return rows


@kernel
def _records_room_kernel(bounds, most, least, tables, BLOCK: tl.constexpr):
    """Write the least of what tables may have of a batch, less what they have; one program."""
    found = tl.full([BLOCK], 1 << 62, tl.int64)
    for begin in range(0, tables, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < tables
        size = tl.load(bounds + at + 1, mask=inside, other=0) - tl.load(bounds + at, mask=inside, other=0)
        found = tl.minimum(found, tl.load(most + at, mask=inside, other=1 << 62) - size)
    tl.store(least, tl.min(found, axis=0))


def _least_room(bounds: Tensor, most: Tensor) -> Tensor:
    least = torch.empty(1, dtype=torch.int64, device=bounds.device)
    launch(_records_room_kernel, 1, bounds, most, least, most.numel(), BLOCK=_BLOCK)
    return least


class _Batch(NamedTuple):
    ids: Tensor
    bounds: Tensor
    now: Tensor | int | None
    counts: Tensor | None


class _Out(NamedTuple):
    """What is written: rows int64 [n], and where new ids are to be listed: how many each program has, int64
    [programs], and space for `numbers` and for those wanted of the map's segments, which are int32 [segments, 3]."""

    rows: Tensor
    news: Tensor | None = None
    numbers: Tensor | None = None
    wanted: Tensor | None = None
    segments: Tensor | None = None


def _find(
    places: tuple[Tensor, Sequence[Tensor]],
    chunks: Sequence[Tensor],
    batch: _Batch,
    layout: Sequence[int],
    out: _Out,
    least: Tensor | None = None,
) -> None:
    """Write what is asked for. least: int64 [1], nothing is touched where it is below 0."""
    where, rows, (directory, map_chunks) = layout_of(layout), out.rows, places
    ids, bounds, now = batch.ids.contiguous(), batch.bounds.contiguous(), batch.now
    place, n, tables = place_of_records(chunks, where, ids.device), ids.numel(), bounds.numel() - 1
    map_bases, shift = segments_of(map_chunks, ids.device)
    given = _Asked(
        ids,
        bounds,
        directory,
        map_bases,
        place.bases,
        now.contiguous() if isinstance(now, Tensor) else rows,
        rows if batch.counts is None else batch.counts.contiguous(),
        rows,
        rows if least is None else least,
        note_of(ids.device, place.total),
        *(rows if one is None else one for one in (out.segments, out.news, out.numbers, out.wanted)),
    )
    plan = _Plan(
        touch=now is not None,
        guarded=least is not None,
        one_time=isinstance(now, Tensor) and now.numel() == 1,
        moment=isinstance(now, int),
        has_counts=batch.counts is not None,
        list_new=out.news is not None,
        meta_at=where.meta_at,
        chunk=place.chunk,
        bits=bits_of(tables),
        block=_BLOCK,
        segments=shift,
    )
    bits, moment = directory.numel().bit_length() - 1, now if isinstance(now, int) else 0
    numbers = n, place.total, tables, bits, 0 if out.segments is None else len(out.segments), moment
    launch(_records_find_kernel, -(-n // _BLOCK), given, *numbers, PLAN=plan)
    check_interpreted(ids.device)


class _Listed(NamedTuple):
    ids: Tensor
    bounds: Tensor
    directory: Tensor
    rows: Tensor
    news: Tensor
    wanted: Tensor
    positions: Tensor
    of: Tensor
    numbers: Tensor
    note: Tensor


@kernel
def _records_new_kernel(given, count, tables, bits, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """List new ids in order of position, and count them by table and by segment of the map."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    table, _, _, inside = table_of(given, at, at < count, tables, BITS)
    fresh = inside & (tl.load(given.rows + at, mask=at < count, other=0) < 0)
    program = tl.program_id(0)
    before = tl.zeros_like(at)
    begin = 0
    while begin < program:
        other = begin + tl.arange(0, BLOCK)
        before += tl.load(given.news + other, mask=other < program, other=0)
        begin += BLOCK
    rank = tl.sum(before, axis=0) + tl.cumsum(fresh.to(tl.int64), axis=0)
    place = rank - 1
    tl.store(given.positions + place, at, mask=fresh)
    tl.store(given.of + place, table, mask=fresh)
    one = tl.full([BLOCK], 1, tl.int64)
    tl.atomic_add(given.numbers + _OF_TABLES + table, one, mask=fresh, sem="relaxed")
    tl.store(given.numbers + _NEW + at * 0, rank, mask=at == count - 1)
    hashes = hash_of(tl.load(given.ids + at, mask=fresh, other=0)) ^ mix64(table.to(tl.uint64, bitcast=True))
    segment = segment_of(given.directory, hashes, fresh, bits)
    wanted = given.wanted.to(tl.pointer_type(tl.int32), bitcast=True)
    held = tl.atomic_add(wanted + segment, tl.full([BLOCK], 1, tl.int32), mask=fresh, sem="relaxed")
    tl.atomic_max(given.numbers + _OVER + at * 0, one, mask=fresh & (held >= _MOST), sem="relaxed")


def find_and_list(
    places: tuple[Tensor, Sequence[Tensor], Tensor],
    chunks: Sequence[Tensor],
    ids: Tensor,
    bounds: Tensor,
    now: Tensor | int,
    counts: Tensor | None,
    layout: Sequence[int],
    most: Tensor | None = None,
    look: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, list[int], Tensor, Tensor | None] | None, bool, list[int]]:
    """Return rows as `records_find` does; if there are some, the ids that have none, as `records.Unknown` has them;
    whether rows were touched; and what `look` gave.

    places: the map's directory, chunks and segments. The host waits once. most, look: as `records.find_unknown`.
    """
    directory, map_chunks, segments = places
    n, device, tables = ids.numel(), ids.device, bounds.numel() - 1
    if n == 0:
        return torch.empty_like(ids), None, True, [] if look is None else look().tolist()
    ids, bounds = ids.contiguous(), bounds.contiguous()
    least, programs = None if most is None else _least_room(bounds, most), -(-n // _BLOCK)
    sizes = n, n, n, programs, 2 + tables, -(-len(segments) // 2)
    rows, positions, of, news, numbers, wanted = parts_of(device, *sizes)
    out = _Out(rows, news, numbers, wanted, segments)
    _find((directory, map_chunks), chunks, _Batch(ids, bounds, now, counts), layout, out, least)
    note = note_of(device, place_of_records(chunks, layout_of(layout), device).total)
    given = _Listed(ids, bounds, directory, rows, news, wanted, positions, of, numbers, note)
    bits = directory.numel().bit_length() - 1
    launch(_records_new_kernel, programs, given, n, tables, bits, BITS=bits_of(tables), BLOCK=_BLOCK)
    more = ([] if least is None else [least]) + ([] if look is None else [look()])
    read = (torch.cat([numbers, *more]) if more else numbers).tolist()  # the host waits here
    (new, over), of_tables, told = read[:2], read[2 : 2 + tables], read[2 + tables :]
    touched = least is None or told.pop(0) >= 0
    if not new:
        return rows, None, touched, told
    counted = numbers[_OF_TABLES.value :]
    in_segments = None if over else wanted.view(torch.int32)[: len(segments)]
    return rows, (positions[:new], of[:new], of_tables, counted, in_segments), touched, told
