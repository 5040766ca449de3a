"""Write new records whole: first values, state, scales, time, count, id, table and mark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.record_layout import COUNT, ID, LAST_SEEN, TABLE, layout_of
from tessera.kernels.reference.bits import signed
from tessera.kernels.reference.random import GOLDEN
from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.faults import check_interpreted, known_positions, known_rows, note_of
from tessera.kernels.triton_ops.launch import kernel, launch
from tessera.kernels.triton_ops.record_plan import Records, place_of_records, plan_of
from tessera.kernels.triton_ops.records import rounding_key

_LAST_SEEN, _COUNT, _ID, _TABLE = (tl.constexpr(place) for place in (LAST_SEEN, COUNT, ID, TABLE))


class _Given(NamedTuple):
    bases: Tensor
    rows: Tensor
    ids: Tensor
    tables: Tensor
    now: Tensor
    counts: Tensor
    keys: Tensor
    stds: Tensor
    note: Tensor
    start: float


class _Plan(NamedTuple):
    one_time: bool
    has_counts: bool
    scales: tuple[float, ...]
    records: Records


@triton.jit
def _write_values(given, address, cells, place, id_, stream, scale, GROUP: tl.constexpr):
    """Write first values and scales of a group; place [ROWS, 1]: of its table and group in keys and stds."""
    known = cells.known
    key = arithmetic.row_key(tl.load(given.keys + 2 * place, mask=known, other=0), id_)
    std = tl.load(given.stds + place, mask=known, other=0.0)
    value = std * arithmetic.normal(key, cells.column)
    size = tl.full(address.shape, 1.0, tl.float32)
    if GROUP.has_scale:
        size = size * scale
        tl.store((address + GROUP.begin).to(tl.pointer_type(tl.float32)), size, mask=known)
    if GROUP.plain:
        value = tl.where(std == 0, 0.0, 0.0 + value)
    round = key
    if not (GROUP.stored.nearest or GROUP.plain):
        round = rounding_key(given.keys, place, stream, id_)
    arithmetic.store_values(address + GROUP.values_at, cells, value, size, round, 0, GROUP.stored, GROUP.align)


@triton.jit
def _write_state(address, known, start, GROUP: tl.constexpr):
    """Write the floats of a group's state; its moments in bfloat16 stay zero."""
    floats: tl.constexpr = GROUP.state_floats
    columns: tl.constexpr = GROUP.columns
    for begin in tl.static_range(0, floats, columns):
        column = begin + tl.arange(0, GROUP.columns)[None, :]
        at = arithmetic.aligned(address + GROUP.step.state_at, GROUP.step.align, tl.float32) + column
        value = (column + address * 0).to(tl.float32) * 0 + start
        tl.store(at, value, mask=known & (column < GROUP.state_floats))


@kernel
def _records_add_kernel(given, count, total, tables, stream, mark, PLAN: tl.constexpr):
    rows: tl.constexpr = PLAN.records.rows
    at = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    inside = at < count
    row = tl.load(given.rows + at, mask=inside, other=-1)
    table = tl.load(given.tables + at, mask=inside, other=0)
    is_known = known_rows(row, inside, total, given.note) & known_positions(table, inside, tables, given.note)
    address = arithmetic.address_of(given.bases, row, is_known, PLAN.records.chunk)[:, None]
    known, table = is_known[:, None], table[:, None]
    words: tl.constexpr = PLAN.records.chunk.bytes // 4
    wide: tl.constexpr = PLAN.records.groups[0].columns
    for begin in range(0, words, wide):
        column = begin + tl.arange(0, wide)[None, :]
        at_word = arithmetic.aligned(address, 16, tl.int32) + column
        tl.store(at_word, tl.full([rows, wide], 0, tl.int32), mask=known & (column < words))
    tl.debug_barrier()  # zeros first, whichever lane writes them
    id_ = tl.load(given.ids + at, mask=inside, other=0)[:, None]
    parts: tl.constexpr = PLAN.records.parts
    for k in tl.static_range(parts):
        column = tl.arange(0, PLAN.records.groups[k].columns)[None, :]
        cells = arithmetic.Cells(column, known, known & (column < PLAN.records.groups[k].dim))
        place = tl.where(known, table, 0) * parts + k
        _write_values(given, address, cells, place, id_, stream, PLAN.scales[k], PLAN.records.groups[k])
        _write_state(address, known, given.start, PLAN.records.groups[k])
    meta = (address + PLAN.records.meta_at).to(tl.pointer_type(tl.int64))
    time = tl.load(given.now + (at * 0 if PLAN.one_time else at), mask=inside, other=0)[:, None]
    often = tl.full([rows, 1], 1, tl.int64)
    if PLAN.has_counts:
        often = tl.load(given.counts + at, mask=inside, other=0)[:, None]
    tl.store(meta + _LAST_SEEN, time, mask=known)
    tl.store(meta + _COUNT, often, mask=known)
    tl.store(meta + _ID, id_, mask=known)
    tl.store(meta + _TABLE, table | (mark.to(tl.int64) << 32) + tl.zeros_like(table), mask=known)


def records_add(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    tables: Tensor,
    now: Tensor,
    counts: Tensor | None,
    keys: Tensor,
    stds: Tensor,
    layout: Sequence[int],
    first: Sequence[float],
    mark: int,
) -> None:
    where = layout_of(layout)
    place, rows, now = place_of_records(chunks, where, rows.device), rows.contiguous(), now.contiguous()
    given = _Given(
        place.bases,
        rows,
        ids.contiguous(),
        tables.contiguous(),
        now,
        rows if counts is None else counts.contiguous(),
        keys,
        stds,
        note_of(rows.device, place.total, keys.shape[0]),
        float(first[0]),
    )
    records = plan_of(place, where)
    plan = _Plan(now.numel() == 1, counts is not None, tuple(float(scale) for scale in first[1:]), records)
    programs = -(-rows.numel() // records.rows)
    numbers = rows.numel(), place.total, keys.shape[0], signed(GOLDEN), mark
    launch(_records_add_kernel, programs, given, *numbers, PLAN=plan, warps=1)
    check_interpreted(rows.device)
