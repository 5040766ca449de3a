"""Find, add, read, write and update the records of many tables at once.

A record is one row of one table with all that belongs to it (`record_layout.py`). Records lie in chunks of uint8
[rows, layout.bytes]: the first is small, each further one has as many rows as all before it, up to a largest size
(`chunk_rows`); so many empty tables cost little, and no record ever moves. Row numbers are those of all tables
together. Row -1 stands for "no row" in every op.

Ids of all tables are flat: those of table t are at bounds[t] to bounds[t + 1] - 1, bounds int64 [tables + 1]. Numbers
that belong to a table and a group are keyed by the table's number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_index
from tessera.kernels.id_map import IdMap
from tessera.kernels.optimizers import OptimizerSettings
from tessera.kernels.random import half_stream, stream
from tessera.kernels.record_layout import RecordLayout, layout_of
from tessera.kernels.reference import records as reference

FIRST_ROWS, MOST_ROWS = 1 << 12, 1 << 18  # of a chunk


class Keys(NamedTuple):
    """What random numbers of a row depend on besides its id. numbers: int64 [tables, groups, 2], the stream of first
    values, and of random rounding what `stream_at` takes; stds: float32 [tables, groups], of first values."""

    numbers: Tensor
    stds: Tensor


class Positions(NamedTuple):
    """Where a batch has gradients of each row: order int64 [n], begins int64 [u + 1]; those of row r are at positions
    order[begins[r]:begins[r + 1]], which ascend. Made by `positions_of` in `kernels/unique.py`."""

    order: Tensor
    begins: Tensor


class Unknown(NamedTuple):
    """Ids of a batch that have no row. positions, tables: int64 [k], ascending; of_tables: how many of each table, and
    counted: the same int64 [tables] where the ids are. segments: what `IdMap.place` needs to take them all without
    waiting; None: `IdMap.insert` has to take them."""

    positions: Tensor
    tables: Tensor
    of_tables: list[int]
    counted: Tensor
    segments: Tensor | None


class LookedUp(NamedTuple):
    """rows: int64 [n]. unknown: those of the ids that have none; None: there are none. noted: whether known ones were.
    told: what `look` gave."""

    rows: Tensor
    unknown: Unknown | None
    noted: bool = True
    told: Sequence[int] = ()


class FirstValues(NamedTuple):
    """Of new records: first value of all state of values, and each group's scale (0 where it has none)."""

    accumulator: float
    scales: tuple[float, ...]


def keys_of(seed: int, tables: Sequence[Sequence[tuple[int, int, float]]], device: torch.device | str = "cpu") -> Keys:
    """Return the keys of tables: for each, for each group, (key of first values, key of rounding, std of first
    values)."""
    numbers = [[[stream(seed, first), half_stream(seed, rounding)] for first, rounding, _ in table] for table in tables]
    stds = [[std for _, _, std in table] for table in tables]
    return Keys(torch.tensor(numbers, device=device), torch.tensor(stds, dtype=torch.float32, device=device))


def chunk_rows(reserved: int, first: int = FIRST_ROWS, most: int = MOST_ROWS) -> int:
    """Return the rows of the chunk that comes after chunks of `reserved` rows. All are powers of two."""
    return first if reserved == 0 else min(reserved, most)


def find(
    id_map: IdMap,
    chunks: Sequence[Tensor],
    ids: Tensor,
    bounds: Tensor,
    layout: RecordLayout,
    now: int | Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Return rows int64 [n] of ids int64 [n], -1 for unknown ones, and note that known ones were seen.

    now: one time or int64 [n]; the time last seen becomes max(itself, now), or `now` in a record that is not in use.
    counts: int64 [n], added to the records' counts (None: 1 each). Ids must then be distinct within a table. now
    None: records stay as they are. Raises ValueError for wrong arguments.
    """
    check_index("ids", ids)
    _check_bounds(bounds)
    times = _times(now, ids)
    _check_counts(counts, ids)
    ops = backend.ops_for(ids) or reference
    return ops.records_find(*id_map.places, chunks, ids, bounds, times, counts, layout.numbers)


def find_unknown(
    id_map: IdMap,
    chunks: Sequence[Tensor],
    ids: Tensor,
    bounds: Tensor,
    layout: RecordLayout,
    now: int | Tensor,
    counts: Tensor | None = None,
    most: Tensor | None = None,
    look: Callable[[], Tensor] | None = None,
) -> LookedUp:
    """Return rows as `find` does, and those of the ids that have none.

    On a GPU the host waits once, to know how many these are; ids from bounds[-1] on, of which
    `unique_tables(..., padded=True)` makes some there, belong to no table: their rows are -1. There alone may be asked
    for `most`, int64 [tables]: nothing is noted if a table has more ids in the batch than it says; and `look`, which
    is called when rows have been noted: what it returns, int64 [k], the host reads with the rest. Raises as `find`.
    """
    ops = backend.triton_for(ids)
    if ops is None:
        assert most is None and look is None, backend.backend(ids.device.type)
        rows = find(id_map, chunks, ids, bounds, layout, now, counts)
        return LookedUp(rows, unknown_of(rows, bounds))
    check_index("ids", ids)
    _check_bounds(bounds)
    _check_counts(counts, ids)
    places = *id_map.places, id_map.segments
    batch = ids, bounds, now if isinstance(now, int) else _times(now, ids), counts
    rows, found, noted, told = ops.find_and_list(places, chunks, *batch, layout.numbers, most, look)
    return LookedUp(rows, None if found is None else Unknown(*found), noted, told)


def unknown_of(rows: Tensor, bounds: Tensor) -> Unknown | None:
    """Return those of a batch's ids that have no row, from what `find` gave; None if there are none. The host waits."""
    positions = (rows < 0).nonzero().flatten()
    if rows.device.type != "cpu":  # where there may be more ids than bounds say
        positions = positions[positions < bounds[-1]]
    if not positions.numel():
        return None
    tables = torch.bucketize(positions, bounds[1:], right=True)
    counted = torch.bincount(tables, minlength=bounds.numel() - 1)
    return Unknown(positions, tables, counted.tolist(), counted, None)


def add(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    tables: Tensor,
    layout: RecordLayout,
    keys: Keys,
    first: FirstValues,
    now: int | Tensor,
    counts: Tensor | None = None,
    mark: int = 0,
) -> None:
    """Write whole new records: values drawn from (seed, table, group, id) alone, state, scales, time, count, id, table.

    rows, ids, tables: int64 [n], rows distinct, -1 is skipped; now, counts as in `find`. A group's values are
    N(0, std); those of low precision are rounded by their draws of step 0. Raises ValueError for wrong arguments,
    IndexError for a row or table out of range.
    """
    for name, index in (("rows", rows), ("ids", ids), ("tables", tables)):
        check_index(name, index)
        if index.numel() != rows.numel():
            raise ValueError(f"{name}: expected {rows.numel()} as there are rows, found {index.numel()}")
    _check_counts(counts, ids)
    times = _times(now, ids)
    ops = backend.ops_for(rows) or reference
    numbers = (first.accumulator, *first.scales)
    ops.records_add(chunks, rows, ids, tables, times, counts, *keys, layout.numbers, numbers, mark)


def gather(
    chunks: Sequence[Tensor],
    rows: Tensor,
    layout: RecordLayout,
    inverse: Tensor | None = None,
    decayed: Tensor | None = None,
) -> Tensor:
    """Return values of rows, all groups side by side: float32 [u, width], or [n, width], row i being that of
    rows[inverse[i]]; row -1 gives zeros.

    decayed: of each table the sum of log(1 - rate decay) over its steps up to now, float64 [tables], where records know
    how far they are decayed. Raises ValueError for wrong arguments, IndexError for a row or inverse out of range.
    """
    check_index("rows", rows)
    if inverse is not None:
        check_index("inverse", inverse)
    _check_decayed(decayed)
    ops = backend.ops_for(rows) or reference
    return ops.records_gather(chunks, rows, layout.numbers, inverse, decayed)


def read(chunks: Sequence[Tensor], rows: Tensor, layout: RecordLayout, begin: int = 0, size: int = 0) -> Tensor:
    """Return bytes [begin, begin + size) of records as they lie in memory, size 0: up to the end: uint8 [n, size].

    rows: int64 [n], -1 gives zeros. Raises ValueError for wrong arguments, IndexError for a row out of range.
    """
    check_index("rows", rows)
    size = size or layout.bytes - begin
    _check_bytes(begin, size, layout)
    ops = backend.ops_for(rows) or reference
    return ops.records_read(chunks, rows, layout.numbers, begin, size)


def write(chunks: Sequence[Tensor], rows: Tensor, stored: Tensor, layout: RecordLayout, begin: int = 0) -> None:
    """Overwrite bytes of records from `begin` on with what `read` gave: uint8 [n, size], or [1, size] for all alike.

    rows: int64 [n], distinct, -1 is skipped. Raises ValueError for wrong arguments, IndexError for a row out of range.
    """
    check_index("rows", rows)
    if stored.dtype != torch.uint8 or stored.dim() != 2 or stored.shape[0] not in (1, rows.numel()):
        found = f"{stored.dtype} {list(stored.shape)}"
        raise ValueError(f"stored: expected uint8 [{rows.numel()} or 1, bytes], found {found}")
    _check_bytes(begin, stored.shape[1], layout)
    ops = backend.ops_for(rows) or reference
    ops.records_write(chunks, rows, stored, layout.numbers, begin)


def update(
    chunks: Sequence[Tensor],
    rows: Tensor,
    grads: Tensor,
    layout: RecordLayout,
    settings: OptimizerSettings,
    rates: Tensor,
    keys: Keys,
    step: int,
    positions: Positions | None = None,
    mark: int = 0,
    decayed: Tensor | None = None,
    power: float = 0.0,
) -> None:
    """Apply one optimizer step to all groups of records, in place (formulas in `update.py`).

    rows: int64 [u], distinct, -1 is skipped; grads: float32 [n, width]; positions: which of them belong to each row,
    summed in order (None: n == u, one each); rates: float64 [tables], each table's learning rate, in place of that
    of the settings; keys, step: seed random rounding; mark: noted in the records if above 0. decayed: as for `gather`,
    this step included: values are decayed by it before they move, which the records note, and exponents become
    count^-power. Raises ValueError for wrong arguments, IndexError for a row or position out of range.
    """
    check_index("rows", rows)
    count = rows.numel() if positions is None else positions.order.numel()
    if grads.dtype != torch.float32 or grads.shape != (count, layout.width):
        raise ValueError(f"grads: expected float32 [{count}, {layout.width}], found {grads.dtype} {list(grads.shape)}")
    order, begins = (None, None) if positions is None else positions
    if begins is not None and begins.numel() != rows.numel() + 1:
        raise ValueError(f"begins: expected {rows.numel() + 1}, found {begins.numel()}")
    tables = keys.numbers.shape[0]
    if rates.dtype != torch.float64 or rates.shape != (tables,):
        raise ValueError(f"rates: expected float64 [{tables}], found {rates.dtype} {list(rates.shape)}")
    ops = backend.ops_for(rows) or reference
    _check_decayed(decayed)
    how = (layout.numbers, settings, step, mark, decayed, power)
    ops.records_update(chunks, rows, grads, order, begins, keys.numbers, rates, *how)


def _check_decayed(decayed: Tensor | None) -> None:
    if decayed is not None and (decayed.dtype != torch.float64 or decayed.dim() != 1 or not decayed.numel()):
        raise ValueError(f"decayed: expected float64 [tables], found {decayed.dtype} {list(decayed.shape)}")


def _times(now: int | Tensor | None, ids: Tensor) -> Tensor | None:
    if now is None:
        return None
    times = torch.full((1,), now, dtype=torch.int64, device=ids.device) if isinstance(now, int) else now
    check_index("now", times)
    if times.numel() not in (1, ids.numel()):
        raise ValueError(f"now: expected one or {ids.numel()} elements, found {times.numel()}")
    return times


def _check_bytes(begin: int, size: int, layout: RecordLayout) -> None:
    if begin < 0 or size < 1 or begin + size > layout.bytes:
        raise ValueError(f"bytes: expected 1 or more inside [0, {layout.bytes}), found [{begin}, {begin + size})")


def _check_counts(counts: Tensor | None, ids: Tensor) -> None:
    if counts is None:
        return
    check_index("counts", counts)
    if counts.numel() != ids.numel():
        raise ValueError(f"counts: expected {ids.numel()} elements, found {counts.numel()}")


def _check_bounds(bounds: Tensor) -> None:
    check_index("bounds", bounds)
    if bounds.numel() < 2:
        raise ValueError(f"bounds: expected 2 or more, found {bounds.numel()}")


@torch.library.register_fake("tessera::records_find")
def _find_fake(
    directory: Tensor,
    map_chunks: list[Tensor],
    chunks: list[Tensor],
    ids: Tensor,
    bounds: Tensor,
    now: Tensor | None,
    counts: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    return ids.new_empty(ids.shape)


@torch.library.register_fake("tessera::records_gather")
def _gather_fake(
    chunks: list[Tensor], rows: Tensor, layout: Sequence[int], inverse: Tensor | None, decayed: Tensor | None = None
) -> Tensor:
    count = (rows if inverse is None else inverse).shape[0]
    return rows.new_empty((count, layout_of(layout).width), dtype=torch.float32)


@torch.library.register_fake("tessera::records_read")
def _read_fake(chunks: list[Tensor], rows: Tensor, layout: Sequence[int], begin: int, size: int) -> Tensor:
    return rows.new_empty((rows.shape[0], size), dtype=torch.uint8)
