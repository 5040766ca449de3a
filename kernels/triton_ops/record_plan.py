"""What kernels on records are told of them: where chunks lie, and where in a record each group's parts are.

Chunks of records double (`kernels/records.py`). Kernels see blocks as large as the first chunk, and have the address of
each: one shift finds it, whatever the size of the chunk that it is a part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.formats import BITS, is_int
from tessera.kernels.layout import RowLayout
from tessera.kernels.record_layout import RecordLayout, is_plain
from tessera.kernels.triton_ops.arithmetic import Stored, load_values
from tessera.kernels.triton_ops.faults import OFFSETS
from tessera.kernels.triton_ops.launch import INTERPRETED
from tessera.kernels.triton_ops.optimizers import Step
from tessera.kernels.triton_ops.rows import Chunk, Place, blocks_of

_KEPT = "_tessera_blocks"  # an attribute of the first chunk
_SPREAD = 1 << 13 if INTERPRETED else 256  # elements of a tile


class Group(NamedTuple):
    """Where a group is, as a constant of kernels: all in bytes from the begin of the record but `column`, its first
    among the values of all groups. columns: a power of two; read: columns that may be read, of which some are of no
    value, so that vectors are whole. align, scale_align: what the places of values and state are multiples of."""

    dim: int
    columns: int
    read: int
    column: int
    begin: int
    values_at: int
    align: int
    stored: Stored
    has_scale: bool
    plain: bool
    step: Step
    state_floats: int
    moments: int


class Records(NamedTuple):
    """The layout of records, as a constant of kernels. rows: of a tile."""

    chunk: Chunk
    meta_at: int
    width: int
    rows: int
    groups: tuple[Group, ...]
    parts: int  # how many groups
    decay_at: int
    decay_floats: int


def place_of_records(chunks: Sequence[Tensor], layout: RecordLayout, device: torch.device) -> Place:
    """Return the place of records. Raises ValueError for chunks that are no multiples of the first.

    Addresses are sent to the device once per growth and kept with the first chunk.
    """
    if not chunks:
        return Place(torch.zeros(1, dtype=torch.int64, device=device), Chunk(0, layout.bytes), 0)
    first, last = chunks[0], chunks[-1]
    kept = getattr(first, _KEPT, None)
    if kept is not None and kept[0] == len(chunks) and kept[1] == last.data_ptr():
        return kept[2]
    rows = first.shape[0]
    blocks = blocks_of(chunks, rows)
    for chunk in chunks:
        if chunk.shape[1:] != (layout.bytes,) or chunk.device != device:
            raise ValueError(f"chunks: expected [rows, {layout.bytes}] on {device}, found {list(chunk.shape)}")
    total = len(blocks) * rows
    bases = torch.tensor(blocks, dtype=torch.int64, device=device)
    found = Place(bases, Chunk(rows.bit_length() - 1, layout.bytes), total)
    setattr(first, _KEPT, (len(chunks), last.data_ptr(), found))
    return found


def plan_of(place: Place, layout: RecordLayout) -> Records:
    """Return the constant that describes records to kernels."""
    groups, column = [], 0
    for group, begin in zip(layout.groups, layout.begins, strict=True):
        groups.append(_group(group, begin, column, layout.bytes))
        column += group.dim
    widest = max(group.columns for group in groups)
    rows = max(1, _SPREAD // widest)
    decay = (layout.decay_at, layout.decay_floats)
    return Records(place.chunk, layout.meta_at, layout.width, rows, tuple(groups), len(groups), *decay)


def _group(group: RowLayout, begin: int, column: int, end: int) -> Group:
    values_at, plain = begin + group.values_at, is_plain(group)
    columns = max(4, triton.next_power_of_2(group.dim))
    whole = -(-group.dim // 4) * 4
    read = whole if plain and values_at + 4 * whole <= end else group.dim
    state_at = begin + group.state_at
    step = Step(
        group.optimizer_number,
        group.dim,
        state_at,
        begin + group.moments_at,
        group.moments > 0,
        _multiple(state_at),
    )
    return Group(
        dim=group.dim,
        columns=columns,
        read=read,
        column=column,
        begin=begin,
        values_at=values_at,
        align=_multiple(values_at),
        stored=Stored(group.format_number, BITS[group.format], group.nearest > 0),
        has_scale=is_int(group.format),
        plain=plain,
        step=step,
        state_floats=group.state_floats,
        moments=group.moments,
    )


def _multiple(offset: int) -> int:
    """Return the largest power of two up to 16 that divides an offset from an aligned place."""
    return next(size for size in (16, 8, 4, 2, 1) if offset % size == 0)


@triton.jit
def table_of(given, at, inside, tables, BITS: tl.constexpr):
    """Return (table, its first position, the one behind its last, whether it has the position) of flat positions int64
    [BLOCK]. Positions from bounds[tables] on are of no table.

    given: with bounds int64 [tables + 1] and note, which tells of bounds that are none.
    """
    table = tl.zeros_like(at)
    for k in tl.static_range(BITS):
        later = table + (1 << (BITS - 1 - k))
        begin = tl.load(given.bounds + later, mask=inside & (later < tables), other=1 << 62)
        table = tl.where(begin <= at, later, table)
    begin = tl.load(given.bounds + table, mask=inside, other=0)
    end = tl.load(given.bounds + table + 1, mask=inside, other=0)
    last = tl.load(given.bounds + tables)
    good = inside & (at >= begin) & (at < end)
    one = tl.full(at.shape, 1, tl.int64)
    tl.atomic_max(given.note + OFFSETS + tl.zeros_like(at), one, mask=inside & (at < last) & ~good, sem="relaxed")
    return table, begin, end, good


def bits_of(tables: int) -> int:
    """Return how often `table_of` halves so many tables."""
    return (tables - 1).bit_length()


@triton.jit
def load_group(address, known, GROUP: tl.constexpr):
    """Return the values of a group of records at addresses [ROWS, 1] as float32 [ROWS, columns], and scales
    [ROWS, 1]."""
    column = tl.arange(0, GROUP.columns)[None, :]
    size = tl.full(address.shape, 1.0, tl.float32)
    if GROUP.has_scale:
        size = tl.load((address + GROUP.begin).to(tl.pointer_type(tl.float32)), mask=known, other=1.0)
    mask = known & (column < GROUP.read)
    value = load_values(
        address + GROUP.values_at, column, mask, size, GROUP.stored.format, GROUP.stored.bits, GROUP.align
    )
    return tl.where(column < GROUP.dim, value, 0.0), size
