"""Rows with optimizer state: read and updated. What a learned scale adds is in `learned.py`.

One set of kernels for packed rows and for plain float32 rows, which differ in where in a row things are
(`kernels/layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.formats import BITS
from tessera.kernels.layout import RowLayout
from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.arithmetic import Stored
from tessera.kernels.triton_ops.faults import check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.gather import rows_at
from tessera.kernels.triton_ops.launch import Tile, kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.merge import Summing, merge, merged
from tessera.kernels.triton_ops.optimizers import FTRL, Step, decayed_ftrl, numbers, step
from tessera.kernels.triton_ops.rows import Chunk, Place, place_of


class _Read(NamedTuple):
    out: Tensor
    bases: Tensor
    rows: Tensor
    inverse: Tensor
    held: Tensor
    note: Tensor


class _ReadPlan(NamedTuple):
    has_inverse: bool
    ahead: bool  # round `held` instead of reading values
    stored: Stored
    values_at: int
    chunk: Chunk
    tile: Tile


@kernel
def _read_kernel(given, positions, count, total, PLAN: tl.constexpr):
    dim: tl.constexpr = PLAN.tile.dim
    at = tl.program_id(0).to(tl.int64) * PLAN.tile.rows + tl.arange(0, PLAN.tile.rows)
    column = tl.arange(0, PLAN.tile.columns)[None, :]
    inside = at < positions
    row = rows_at(given, at, inside, count, PLAN.has_inverse)
    known = known_rows(row, inside, total, given.note)
    address = arithmetic.address_of(given.bases, row, known, PLAN.chunk)[:, None]
    mask = known[:, None] & (column < dim)
    size = tl.full([PLAN.tile.rows, 1], 1.0, tl.float32)
    if PLAN.stored.format >= arithmetic.INT8:
        size = tl.load(address.to(tl.pointer_type(tl.float32)), mask=known[:, None], other=1.0)
    if PLAN.ahead:
        place = at
        if PLAN.has_inverse:
            place = tl.load(given.inverse + at, mask=known, other=0)
        x = tl.load(given.held + place[:, None] * dim + column, mask=mask, other=0.0)
        code = arithmetic.to_code(tl.div_rn(x, size + tl.zeros_like(x)), x, NEAREST=True, BITS=PLAN.stored.bits)
        value = size * code
    else:
        address += PLAN.values_at
        value = arithmetic.load_values(address, column, mask, size, PLAN.stored.format, PLAN.stored.bits)
    value = tl.where(mask, value, 0.0)
    tl.store(given.out + at[:, None] * dim + column, value, mask=inside[:, None] & (column < dim))


def packed_gather(chunks: Sequence[Tensor], rows: Tensor, layout: Sequence[int], inverse: Tensor | None) -> Tensor:
    return _read(chunks, rows, None, RowLayout(*layout), inverse)


def packed_fake_quantise(
    chunks: Sequence[Tensor], rows: Tensor, held: Tensor, layout: Sequence[int], inverse: Tensor | None
) -> Tensor:
    return _read(chunks, rows, held, RowLayout(*layout), inverse)


def _read(
    chunks: Sequence[Tensor], rows: Tensor, held: Tensor | None, layout: RowLayout, inverse: Tensor | None
) -> Tensor:
    place = place_of(chunks, rows.device)
    rows, dim = rows.contiguous(), layout.dim
    count = rows.numel() if inverse is None else inverse.numel()
    out = torch.empty((count, dim), device=rows.device)
    given = _Read(
        out,
        place.bases,
        rows,
        rows if inverse is None else inverse.contiguous(),
        out if held is None else held,
        note_of(rows.device, place.total, rows.numel()),
    )
    shape, stored = tile(dim, least=4), Stored(layout.format_number, BITS[layout.format], nearest=True)
    launch(
        _read_kernel,
        -(-count // shape.rows),
        given,
        count,
        rows.numel(),
        place.total,
        PLAN=_ReadPlan(inverse is not None, held is not None, stored, layout.values_at, place.chunk, shape),
        warps=warps_of(shape),
    )
    check_interpreted(rows.device)
    return out


class RowsToUpdate(NamedTuple):
    """What kernels that update rows are given beside gradients. held: float32 values by place in `rows`."""

    bases: Tensor
    rows: Tensor
    ids: Tensor
    held: Tensor
    note: Tensor
    kept: Tensor


class UpdatePlan(NamedTuple):
    """The constants of kernels that update rows."""

    hold: bool  # write values to `held` instead of into rows
    sum: Summing
    step: Step
    stored: Stored
    values_at: int
    chunk: Chunk
    tile: Tile
    decays: bool = False


@kernel
def _update_kernel(given, grads, count, total, stream, hyper, PLAN: tl.constexpr):
    dim: tl.constexpr = PLAN.tile.dim
    at = tl.program_id(0).to(tl.int64) * PLAN.tile.rows + tl.arange(0, PLAN.tile.rows)
    column = tl.arange(0, PLAN.tile.columns)[None, :]
    inside = at < count
    row = tl.load(given.rows + at, mask=inside, other=-1)
    is_known = known_rows(row, inside, total, given.note)
    g = merged(grads, at, is_known, PLAN.sum, PLAN.tile)
    address = arithmetic.address_of(given.bases, row, is_known, PLAN.chunk)[:, None]
    known = is_known[:, None]
    cells = arithmetic.Cells(column, known, known & (column < dim))
    size = tl.full([PLAN.tile.rows, 1], 1.0, tl.float32)
    if PLAN.stored.format >= arithmetic.INT8:
        size = tl.load(address.to(tl.pointer_type(tl.float32)), mask=known, other=1.0)
    key = tl.full([PLAN.tile.rows, 1], 0, tl.uint64)
    if PLAN.step.half_moments or not (PLAN.stored.nearest or PLAN.stored.format == arithmetic.FP32):
        key = arithmetic.row_key(stream, tl.load(given.ids + at, mask=inside, other=0))[:, None]
    values = address + PLAN.values_at
    w = arithmetic.load_values(values, column, cells.mask, size, PLAN.stored.format, PLAN.stored.bits)
    if PLAN.decays:
        kept = tl.load(given.kept + at, mask=inside, other=1.0)[:, None]
        w *= kept
        if PLAN.step.optimizer == FTRL:
            decayed_ftrl(address + PLAN.step.state_at, kept, cells, hyper, PLAN.step.align)
    w = step(w, g, address, cells, key, hyper, PLAN.step)
    if PLAN.hold:
        inside_row = inside[:, None] & (column < dim)
        tl.store(given.held + at[:, None] * dim + column, tl.where(cells.mask, w, 0.0), mask=inside_row)
    else:
        arithmetic.store_values(values, cells, w, size, key, 0, PLAN.stored)


def update(
    chunks: Sequence[Tensor],
    rows: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    layout: Sequence[int],
    settings: Sequence[float],
) -> None:
    packed_update(chunks, rows, rows, grads, inverse, None, layout, settings, 0)


def packed_update(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    held: Tensor | None,
    layout: Sequence[int],
    settings: Sequence[float],
    stream: int,
    kept: Tensor | None = None,
) -> None:
    place, where = place_of(chunks, rows.device), RowLayout(*layout)
    rows, ids, count = rows.contiguous(), ids.contiguous(), rows.numel()
    note = note_of(rows.device, place.total, count)
    gradients = merge(grads, inverse, count, note)
    of_rows = Step(where.optimizer_number, where.dim, where.state_at, where.moments_at, where.moments > 0)
    plan = update_plan(place, where, gradients.how, of_rows)._replace(hold=held is not None, decays=kept is not None)
    launch(
        _update_kernel,
        -(-count // plan.tile.rows),
        RowsToUpdate(place.bases, rows, ids, _or(held, gradients.grads.grads), note, _or(kept, note)),
        gradients.grads,
        count,
        place.total,
        stream,
        numbers(settings),
        PLAN=plan,
        warps=1,
    )
    check_interpreted(rows.device)


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    return other if given is None else given.contiguous()


def update_plan(place: Place, layout: RowLayout, how: Summing, step: Step) -> UpdatePlan:
    """Return the constants of a kernel that writes values into rows."""
    stored = Stored(layout.format_number, BITS[layout.format], layout.nearest > 0)
    return UpdatePlan(
        hold=False,
        sum=how,
        step=step,
        stored=stored,
        values_at=layout.values_at,
        chunk=place.chunk,
        tile=tile(layout.dim, least=4),
    )
