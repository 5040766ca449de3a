"""Read records and update them: all groups of a record in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.optimizers import OPTIMIZERS
from tessera.kernels.record_layout import COUNT, ID, TABLE, RecordLayout, layout_of
from tessera.kernels.reference.bits import signed
from tessera.kernels.reference.random import GOLDEN
from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.faults import check_interpreted, known_positions, known_rows, note_of
from tessera.kernels.triton_ops.gather import rows_at
from tessera.kernels.triton_ops.launch import Tile, kernel, launch, tile, warps_of
from tessera.kernels.triton_ops.optimizers import FTRL, Numbers, decayed_ftrl, numbers, step
from tessera.kernels.triton_ops.record_plan import Records, load_group, place_of_records, plan_of

PIECE = 64  # positions that are summed by one program where a row has many
LONG = 2 * PIECE  # a row of more positions has some summed by others
TURN = tl.constexpr(4)  # gradients asked for before the first is added
_COUNT, _ID, _TABLE = tl.constexpr(COUNT), tl.constexpr(ID), tl.constexpr(TABLE)
_TABLE_MASK = tl.constexpr((1 << 32) - 1)


class _Read(NamedTuple):
    out: Tensor
    bases: Tensor
    rows: Tensor
    inverse: Tensor
    note: Tensor
    decayed: Tensor


@triton.jit
def _sum_now(decayed, tables, address, known, PLAN: tl.constexpr):
    """Return the sum of log(1 - rate decay) over the steps of each record's table: float64 [ROWS, 1]."""
    meta = (address + PLAN.meta_at).to(tl.pointer_type(tl.int64))
    table = tl.minimum(tl.load(meta + _TABLE, mask=known, other=0) & _TABLE_MASK, tables - 1)
    return tl.load(decayed + table, mask=known, other=0.0)


@triton.jit
def _kept(decayed, tables, address, known, PLAN: tl.constexpr):
    """Return how much of their values records keep up to now: float32 [ROWS, 1]."""
    seen = (address + PLAN.decay_at).to(tl.pointer_type(tl.float64))
    since = _sum_now(decayed, tables, address, known, PLAN) - tl.load(seen, mask=known, other=0.0)
    if PLAN.decay_floats == 2:
        since *= tl.load(seen + 1, mask=known, other=0.0)
    return tl.exp(since).to(tl.float32)


@kernel
def _records_gather_kernel(given, positions, count, total, tables, HAS_INVERSE: tl.constexpr, PLAN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * PLAN.rows + tl.arange(0, PLAN.rows)
    inside = at < positions
    row = rows_at(given, at, inside, count, HAS_INVERSE)
    known = known_rows(row, inside, total, given.note)
    address = arithmetic.address_of(given.bases, row, known, PLAN.chunk)[:, None]
    parts: tl.constexpr = PLAN.parts
    if PLAN.decay_floats > 0:
        kept = _kept(given.decayed, tables, address, known[:, None], PLAN)
    for k in tl.static_range(parts):
        value, _ = load_group(address, known[:, None], PLAN.groups[k])
        if PLAN.decay_floats > 0:
            value *= kept
        column = tl.arange(0, PLAN.groups[k].columns)[None, :]
        value = tl.where(known[:, None], value, 0.0)
        out = given.out + at[:, None] * PLAN.width + PLAN.groups[k].column + column
        tl.store(out, value, mask=inside[:, None] & (column < PLAN.groups[k].dim))


def records_gather(
    chunks: Sequence[Tensor],
    rows: Tensor,
    layout: Sequence[int],
    inverse: Tensor | None,
    decayed: Tensor | None = None,
) -> Tensor:
    where = layout_of(layout)
    decayed = _checked(where, decayed, rows)
    place, rows = place_of_records(chunks, where, rows.device), rows.contiguous()
    count = rows.numel() if inverse is None else inverse.numel()
    out, plan = torch.empty((count, where.width), device=rows.device), plan_of(place, where)
    index = rows if inverse is None else inverse.contiguous()
    launch(
        _records_gather_kernel,
        -(-count // plan.rows),
        _Read(out, place.bases, rows, index, note_of(rows.device, place.total, rows.numel()), decayed),
        count,
        rows.numel(),
        place.total,
        decayed.numel(),
        HAS_INVERSE=inverse is not None,
        PLAN=plan,
        warps=warps_of(Tile(plan.width, plan.rows, plan.groups[0].columns)),
    )
    check_interpreted(rows.device)
    return out


def _checked(layout: RecordLayout, decayed: Tensor | None, rows: Tensor) -> Tensor:
    """Return `decayed`, or where records do not decay what stands for it. Raises ValueError."""
    if (decayed is not None) != (layout.decay_floats > 0):
        raise ValueError("decayed: expected where records know how far they are decayed")
    return rows if decayed is None else decayed.contiguous()


class _Merged(NamedTuple):
    """Gradients by row. sums float32 [n // PIECE, width]: those of pieces that belong to one row as a whole."""

    grads: Tensor
    order: Tensor
    begins: Tensor
    sums: Tensor
    note: Tensor


class _Summing(NamedTuple):
    """How gradients are summed, as a constant of kernels. direct: row r has gradient r alone."""

    direct: bool
    long: bool
    width: int
    piece: int = PIECE
    most: int = LONG


@triton.jit
def _zeros(row, GROUP: tl.constexpr):
    """Return float32 zeros [ROWS, columns]; row [ROWS]."""
    rows: tl.constexpr = row.shape[0]
    columns: tl.constexpr = GROUP.columns
    return tl.zeros([rows, columns], tl.float32)


@triton.jit
def _ordered_sum(given, total, begin, length, positions, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Add to total [ROWS, columns] the gradients at positions order[begin : begin + length], in order; int64 [ROWS]."""
    column = tl.arange(0, GROUP.columns)[None, :]
    highest, lowest = tl.zeros_like(begin), tl.zeros_like(begin)
    for j in range(0, tl.max(length, axis=0), TURN):
        for k in tl.static_range(TURN):
            inside = j + k < length
            at = tl.load(given.order + begin + j + k, mask=inside, other=0)
            highest, lowest = tl.maximum(highest, at), tl.minimum(lowest, at)
            good = inside & (at >= 0) & (at < positions)
            mask = good[:, None] & (column < GROUP.dim)
            value = tl.load(given.grads + at[:, None] * WIDTH + GROUP.column + column, mask=mask, other=0.0)
            total += value
    known_positions(highest, length > 0, positions, given.note)
    known_positions(lowest, length > 0, positions, given.note)
    return total


@triton.jit
def _added_pieces(given, total, begin, length, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Add to total the sums of pieces [begin, begin + length), in order."""
    column = tl.arange(0, GROUP.columns)[None, :]
    for j in range(0, tl.max(length, axis=0), TURN):
        for k in tl.static_range(TURN):
            mask = (j + k < length)[:, None] & (column < GROUP.dim)
            at = (begin + j + k)[:, None] * WIDTH + GROUP.column + column
            total += tl.load(given.sums + at, mask=mask, other=0.0)
    return total


@triton.jit
def _range_of(given, row, inside, positions):
    """Return (first position in `order`, how many) of places `row` among the batch's rows."""
    begin = tl.load(given.begins + row, mask=inside, other=0)
    end = tl.load(given.begins + row + 1, mask=inside, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), positions)
    return begin, tl.maximum(tl.minimum(end, positions), begin) - begin


@triton.jit
def _summed(given, row, inside, positions, GROUP: tl.constexpr, SUM: tl.constexpr):
    """Return the gradients of a group, summed, of places `row` among the batch's rows: float32 [ROWS, columns]."""
    column = tl.arange(0, GROUP.columns)[None, :]
    if SUM.direct:
        mask = inside[:, None] & (column < GROUP.dim)
        return tl.load(given.grads + row[:, None] * SUM.width + GROUP.column + column, mask=mask, other=0.0)
    begin, length = _range_of(given, row, inside, positions)
    total = _zeros(row, GROUP)
    if not SUM.long:
        return _ordered_sum(given, total, begin, length, positions, GROUP, SUM.width)
    long = length > SUM.most
    head = tl.where(long, (SUM.piece - begin % SUM.piece) % SUM.piece, length)
    piece = (begin + head) // SUM.piece
    pieces = tl.where(long, (begin + length) // SUM.piece - piece, 0)
    total = _ordered_sum(given, total, begin, head, positions, GROUP, SUM.width)
    total = _added_pieces(given, total, piece, pieces, GROUP, SUM.width)
    tail = begin + head + pieces * SUM.piece
    return _ordered_sum(given, total, tail, begin + length - tail, positions, GROUP, SUM.width)


@kernel
def _records_piece_kernel(given, positions, pieces, count, SUM: tl.constexpr, BITS: tl.constexpr, PLAN: tl.constexpr):
    """Sum pieces of PIECE positions of which all are of one row that has many."""
    piece = tl.program_id(0).to(tl.int64) * PLAN.rows + tl.arange(0, PLAN.rows)
    begin, inside = piece * SUM.piece, piece < pieces
    row = tl.zeros_like(piece)
    for k in tl.static_range(BITS):
        later = row + (1 << (BITS - 1 - k))
        first = tl.load(given.begins + later, mask=inside & (later < count), other=1 << 62)
        row = tl.where(first <= begin, later, row)
    first, length = _range_of(given, row, inside, positions)
    whole = inside & (length > SUM.most) & (first <= begin) & (begin + SUM.piece <= first + length)
    taken = tl.where(whole, SUM.piece, 0).to(tl.int64)
    parts: tl.constexpr = PLAN.parts
    for k in tl.static_range(parts):
        column = tl.arange(0, PLAN.groups[k].columns)[None, :]
        total = _zeros(piece, PLAN.groups[k])
        total = _ordered_sum(given, total, begin, taken, positions, PLAN.groups[k], SUM.width)
        at = given.sums + piece[:, None] * SUM.width + PLAN.groups[k].column + column
        tl.store(at, total, mask=whole[:, None] & (column < PLAN.groups[k].dim))


class _Update(NamedTuple):
    bases: Tensor
    rows: Tensor
    keys: Tensor
    rates: Tensor
    starts: Tensor
    note: Tensor
    decayed: Tensor


@triton.jit
def _numbers_of(given, table, known, hyper, OPTIMIZER: tl.constexpr):
    """Return the hyperparameters of rows [ROWS, 1]: those of all, but for the rate of each one's table."""
    rate = tl.load(given.rates + table, mask=known, other=1.0)
    high = rate.to(tl.float32)
    start = high
    if OPTIMIZER == FTRL:
        start = tl.load(given.starts + table, mask=known, other=0.0)
    return Numbers(
        high,
        (rate - high.to(tl.float64)).to(tl.float32),
        hyper.decay,
        hyper.eps,
        hyper.rest1,
        hyper.beta2,
        hyper.rest2,
        hyper.log_beta1,
        hyper.log_beta1_rest,
        hyper.log_beta2,
        hyper.log_beta2_rest,
        hyper.beta,
        hyper.l1,
        hyper.l2,
        start,
        hyper.gradient_scale,
    )


@triton.jit
def rounding_key(keys, place, turn, id_):
    """Return the key of random rounding at a step; place: of a table's group in keys int64 [..., 2], turn: step + G."""
    half = tl.load(keys + 2 * place + 1).to(tl.uint64, bitcast=True)
    stream = arithmetic.mix64(half + turn.to(tl.int64).to(tl.uint64, bitcast=True))
    return arithmetic.mix64(arithmetic.hash_of(id_) ^ stream)


@triton.jit
def _set_decayed(given, tables, address, known, power, PLAN: tl.constexpr):
    seen = (address + PLAN.decay_at).to(tl.pointer_type(tl.float64))
    tl.store(seen, _sum_now(given.decayed, tables, address, known, PLAN), mask=known)
    if PLAN.decay_floats == 2:
        meta = (address + PLAN.meta_at).to(tl.pointer_type(tl.int64))
        count = tl.load(meta + _COUNT, mask=known, other=1).to(tl.float64)
        tl.store(seen + 1, tl.exp(-power * tl.log(count)), mask=known)


@kernel
def _records_update_kernel(
    given, grads, hyper, count, total, positions, tables, stream, mark, power, SUM: tl.constexpr, PLAN: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * PLAN.rows + tl.arange(0, PLAN.rows)
    inside = at < count
    row = tl.load(given.rows + at, mask=inside, other=-1)
    is_known = known_rows(row, inside, total, given.note)
    address = arithmetic.address_of(given.bases, row, is_known, PLAN.chunk)[:, None]
    known = is_known[:, None]
    meta = (address + PLAN.meta_at).to(tl.pointer_type(tl.int64))
    id_ = tl.load(meta + _ID, mask=known, other=0)
    table = tl.load(meta + _TABLE, mask=known, other=0) & _TABLE_MASK
    table = tl.minimum(table, tables - 1)
    n = _numbers_of(given, table, known, hyper, PLAN.groups[0].step.optimizer)
    if PLAN.decay_floats > 0:
        kept = _kept(given.decayed, tables, address, known, PLAN)
    parts: tl.constexpr = PLAN.parts
    for k in tl.static_range(parts):
        column = tl.arange(0, PLAN.groups[k].columns)[None, :]
        g = _summed(grads, at, is_known, positions, PLAN.groups[k], SUM)
        cells = arithmetic.Cells(column, known, known & (column < PLAN.groups[k].dim))
        w, size = load_group(address, known, PLAN.groups[k])
        if PLAN.decay_floats > 0:
            w *= kept
            if PLAN.groups[k].step.optimizer == FTRL:
                state = address + PLAN.groups[k].step.state_at
                decayed_ftrl(state, kept, cells, n, PLAN.groups[k].step.align)
        key = tl.full(address.shape, 0, tl.uint64)
        if PLAN.groups[k].step.half_moments or not (PLAN.groups[k].stored.nearest or PLAN.groups[k].plain):
            key = rounding_key(given.keys, table * parts + k, stream, id_)
        w = step(w, g, address, cells, key, n, PLAN.groups[k].step)
        values = address + PLAN.groups[k].values_at
        arithmetic.store_values(values, cells, w, size, key, 0, PLAN.groups[k].stored, PLAN.groups[k].align)
    upper = mark.to(tl.int64) << 32
    tl.store(meta + _TABLE, table | upper + tl.zeros_like(table), mask=known & (upper > 0))
    if PLAN.decay_floats > 0:
        _set_decayed(given, tables, address, known, power, PLAN)


def records_update(
    chunks: Sequence[Tensor],
    rows: Tensor,
    grads: Tensor,
    order: Tensor | None,
    begins: Tensor | None,
    keys: Tensor,
    rates: Tensor,
    layout: Sequence[int],
    settings: Sequence[float],
    step: int,
    mark: int,
    decayed: Tensor | None = None,
    power: float = 0.0,
) -> None:
    where = layout_of(layout)
    decayed = _checked(where, decayed, rows)
    place, rows, count = place_of_records(chunks, where, rows.device), rows.contiguous(), rows.numel()
    note, plan = note_of(rows.device, place.total, grads.shape[0]), plan_of(place, where)
    merged, how = _merged(grads.contiguous(), order, begins, note, plan)
    ftrl = OPTIMIZERS[where.groups[0].optimizer_number] == "ftrl"
    launch(
        _records_update_kernel,
        -(-count // plan.rows),
        _Update(place.bases, rows, keys, rates, _starts(rates, settings) if ftrl else rates, note, decayed),
        merged,
        numbers(settings),
        count,
        place.total,
        grads.shape[0],
        rates.numel(),
        signed(step + GOLDEN),
        mark,
        power,
        SUM=how,
        PLAN=plan,
        warps=1,
    )
    check_interpreted(rows.device)


def _starts(rates: Tensor, settings: Sequence[float]) -> Tensor:
    """Return what makes z of an element of FTRL without gradients so far of its value, of each table."""
    _, _, _, _, _, beta, _, l2, _ = settings
    return (beta / rates + l2).to(torch.float32)


def _merged(
    grads: Tensor, order: Tensor | None, begins: Tensor | None, note: Tensor, plan: Records
) -> tuple[_Merged, _Summing]:
    n, width = grads.shape
    if order is None or begins is None:
        return _Merged(grads, note, note, grads, note), _Summing(direct=True, long=False, width=width)
    order, begins = order.contiguous(), begins.contiguous()
    if n <= LONG:
        return _Merged(grads, order, begins, grads, note), _Summing(direct=False, long=False, width=width)
    pieces, count = n // PIECE, begins.numel() - 1
    given = _Merged(grads, order, begins, torch.empty((pieces, width), device=grads.device), note)
    how = _Summing(direct=False, long=True, width=width)
    launch(
        _records_piece_kernel,
        -(-pieces // plan.rows),
        given,
        n,
        pieces,
        count,
        SUM=how,
        BITS=max(1, (count - 1).bit_length()),
        PLAN=plan,
        warps=warps_of(tile(plan.groups[0].columns)),
    )
    return given, how
