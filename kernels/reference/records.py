"""Records in torch: their bytes are taken apart by group, worked on as rows of one group are, and put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.kernels.layout import RowLayout
from tessera.kernels.record_layout import COUNT, ID, LAST_SEEN, META_BYTES, TABLE, RecordLayout, is_plain, layout_of
from tessera.kernels.reference import random
from tessera.kernels.reference.gather import checked
from tessera.kernels.reference.id_map import id_map_find
from tessera.kernels.reference.packed import Parts
from tessera.kernels.reference.quantise import dequantised, rounded
from tessera.kernels.reference.update import decay
from tessera.kernels.reference.update import step as optimizer_step

TABLE_BITS = (1 << 32) - 1


def by_chunk(chunks: Sequence[Tensor], rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (chunk, positions in `rows`, rows inside the chunk) for every chunk asked for; -1 is left out.

    Raises IndexError for a row beyond the last chunk.
    """
    ends = torch.tensor([chunk.shape[0] for chunk in chunks], device=rows.device).cumsum(0)
    total = int(ends[-1]) if len(chunks) else 0
    if rows.numel() and int(rows.max()) >= total:
        raise IndexError(f"rows: expected below {total}, found {int(rows.max())}")
    number = torch.where(rows < 0, -1, torch.bucketize(rows, ends, right=True))
    for chunk in number.unique().tolist():
        if chunk >= 0:
            positions = (number == chunk).nonzero().flatten()
            yield chunks[chunk], positions, rows[positions] - (int(ends[chunk]) - chunks[chunk].shape[0])


def tables_of(bounds: Tensor, ids: int) -> Tensor:
    """Return the table of each of `ids` flat ids: int64 [ids]. Raises ValueError for bounds that are none."""
    lengths = bounds.diff()
    if int(bounds[0]) != 0 or int(bounds[-1]) != ids or bool((lengths < 0).any()):
        raise ValueError(f"bounds: expected ascending from 0 to {ids}")
    return torch.arange(lengths.numel(), device=bounds.device).repeat_interleave(lengths)


def meta_of(block: Tensor, layout: RecordLayout) -> Tensor:
    """Return time, count, id, and table with mark, of records uint8 [n, bytes]: int64 [n, 4]."""
    part = _copied(block[:, layout.meta_at : layout.meta_at + META_BYTES])
    return part.view(torch.int64).reshape(block.shape[0], META_BYTES // 8)


def _copied(columns: Tensor) -> Tensor:
    """Return a copy with no gaps. `contiguous` would copy nothing of a single row."""
    return columns.clone(memory_format=torch.contiguous_format)


def set_meta(block: Tensor, layout: RecordLayout, meta: Tensor) -> None:
    bytes_ = meta.contiguous().view(torch.uint8).reshape(block.shape[0], META_BYTES)
    block[:, layout.meta_at : layout.meta_at + META_BYTES] = bytes_


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
    rows = id_map_find(directory, map_chunks, ids, tables_of(bounds, ids.numel()))
    if now is not None:
        now = now.expand(ids.numel())
        for chunk, positions, local in by_chunk(chunks, rows):
            block = chunk[local]
            _see(block, layout_of(layout), now[positions], None if counts is None else counts[positions])
            chunk[local] = block
    return rows


def _see(block: Tensor, layout: RecordLayout, times: Tensor, counts: Tensor | None) -> None:
    meta = meta_of(block, layout)
    later = torch.maximum(meta[:, LAST_SEEN], times)
    meta[:, LAST_SEEN] = torch.where(meta[:, COUNT] == 0, times, later)
    meta[:, COUNT] += 1 if counts is None else counts
    set_meta(block, layout, meta)


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
    if tables.numel() and not 0 <= int(tables.min()) <= int(tables.max()) < keys.shape[0]:
        found = f"{int(tables.min())} to {int(tables.max())}"
        raise IndexError(f"tables: expected below {keys.shape[0]}, found {found}")
    now = now.expand(rows.numel())
    for chunk, positions, local in by_chunk(chunks, rows):
        block = chunk.new_zeros((local.numel(), where.bytes))
        id_, table = ids[positions], tables[positions]
        for number, (group, begin) in enumerate(zip(where.groups, where.begins, strict=True)):
            key, std = keys[table, number], stds[table, number]
            _write_first(block, group, begin, id_, key, std, first[0], first[1 + number])
        _see(block, where, now[positions], None if counts is None else counts[positions])
        meta = meta_of(block, where)
        meta[:, ID], meta[:, TABLE] = id_, table | mark << 32
        set_meta(block, where, meta)
        chunk[local] = block


def _write_first(
    block: Tensor, group: RowLayout, begin: int, ids: Tensor, keys: Tensor, stds: Tensor, start: float, scale: float
) -> None:
    """Write first values and state of one group; keys int64 [n, 2] and stds [n] are of each row's table."""
    values = random.normal_of(random.row_key(keys[:, 0], ids), group.dim)
    if is_plain(group):
        values = 0.0 + stds[:, None] * values
        values[stds == 0] = 0.0
        state = values.new_full((len(block), group.state_floats), start)
        _put(block, group.values_at, values)
        _put(block, group.state_at, state)
        return
    parts = Parts(block[:, begin : begin + group.bytes], group)
    if parts.scales is not None:
        parts.scales = torch.full_like(parts.scales, scale)
    parts.state[:, group.moments :] = start
    parts.codes = _codes(values * stds[:, None], parts, group, random.stream_at(keys[:, 1], 0), ids)
    block[:, begin : begin + group.bytes] = parts.bytes(group)


def _codes(values: Tensor, parts: Parts, group: RowLayout, streams: Tensor, ids: Tensor) -> Tensor:
    draws = None
    if not group.nearest and group.format != "fp32":
        draws = random.draws_of(random.row_key(streams, ids), group.dim)
    return rounded(values, parts.scales, group.format, draws)


def records_read(chunks: Sequence[Tensor], rows: Tensor, layout: Sequence[int], begin: int, size: int) -> Tensor:
    result = torch.zeros((rows.numel(), size), dtype=torch.uint8, device=rows.device)
    for chunk, positions, local in by_chunk(chunks, rows):
        result[positions] = chunk[local, begin : begin + size]
    return result


def records_write(chunks: Sequence[Tensor], rows: Tensor, stored: Tensor, layout: Sequence[int], begin: int) -> None:
    for chunk, positions, local in by_chunk(chunks, rows):
        chunk[local, begin : begin + stored.shape[1]] = stored if len(stored) == 1 else stored[positions]


def records_gather(
    chunks: Sequence[Tensor],
    rows: Tensor,
    layout: Sequence[int],
    inverse: Tensor | None,
    decayed: Tensor | None = None,
) -> Tensor:
    where = layout_of(layout)
    _check_decayed(where, decayed)
    result = torch.zeros((rows.numel(), where.width), device=rows.device)
    for chunk, positions, local in by_chunk(chunks, rows):
        block = chunk[local]
        groups = zip(where.groups, where.begins, strict=True)
        values = torch.cat([_values(block, group, begin) for group, begin in groups], dim=1)
        result[positions] = values if decayed is None else values * kept(block, where, decayed)[:, None]
    return result if inverse is None else result[checked(inverse, rows)]


def _check_decayed(layout: RecordLayout, decayed: Tensor | None) -> None:
    if (decayed is not None) != (layout.decay_floats > 0):
        raise ValueError("decayed: expected where records know how far they are decayed")


def kept(block: Tensor, layout: RecordLayout, decayed: Tensor) -> Tensor:
    """Return how much of their values records keep up to now: float32 [n]. decayed: float64 [tables]."""
    seen = _seen(block, layout)
    since = decayed[_tables_in(block, layout, decayed.numel())] - seen[:, 0]
    return (since if layout.decay_floats == 1 else since * seen[:, 1]).exp().float()


def _seen(block: Tensor, layout: RecordLayout) -> Tensor:
    part = _copied(block[:, layout.decay_at : layout.decay_at + 8 * layout.decay_floats])
    return part.view(torch.float64).reshape(block.shape[0], layout.decay_floats)


def _tables_in(block: Tensor, layout: RecordLayout, tables: int) -> Tensor:
    return (meta_of(block, layout)[:, TABLE] & TABLE_BITS).clamp(max=tables - 1)


def _set_decayed(block: Tensor, layout: RecordLayout, decayed: Tensor, power: float) -> None:
    seen = decayed[_tables_in(block, layout, decayed.numel())][:, None]
    if layout.decay_floats == 2:
        seen = torch.cat([seen, meta_of(block, layout)[:, COUNT, None].double() ** -power], dim=1)
    end = layout.decay_at + 8 * layout.decay_floats
    block[:, layout.decay_at : end] = seen.contiguous().view(torch.uint8).reshape(len(block), -1)


def _values(block: Tensor, group: RowLayout, begin: int) -> Tensor:
    if is_plain(group):
        return _floats(block, group.values_at, group.dim)
    parts = Parts(block[:, begin : begin + group.bytes], group)
    return dequantised(parts.codes, parts.scales, group.format, group.dim)


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
    _check_decayed(where, decayed)
    sums = _summed(grads, rows, order, begins)
    for chunk, positions, local in by_chunk(chunks, rows):
        block = chunk[local]
        parts = sums[positions].split([group.dim for group in where.groups], dim=1)
        meta = meta_of(block, where)
        tables = _tables_in(block, where, keys.shape[0])
        left = None if decayed is None else kept(block, where, decayed)
        for number, (group, begin) in enumerate(zip(where.groups, where.begins, strict=True)):
            streams = random.stream_at(keys[tables, number, 1], step)
            batch = Batch(parts[number], rates[tables], streams, meta[:, ID], left)
            _step_group(block, group, begin, batch, settings)
        if mark > 0:
            meta[:, TABLE] = (meta[:, TABLE] & TABLE_BITS) | mark << 32
            set_meta(block, where, meta)
        if decayed is not None:
            _set_decayed(block, where, decayed, power)
        chunk[local] = block


def _summed(grads: Tensor, rows: Tensor, order: Tensor | None, begins: Tensor | None) -> Tensor:
    if order is None or begins is None:
        return grads
    if grads.shape[0] and not 0 <= int(order.min()) <= int(order.max()) < grads.shape[0]:
        raise IndexError(f"order: expected below {grads.shape[0]}, found {int(order.min())} to {int(order.max())}")
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(rows.numel(), device=rows.device).repeat_interleave(begins.diff())
    return grads.new_zeros((rows.numel(), grads.shape[1])).index_add_(0, inverse, grads)


class Batch(NamedTuple):
    """Of each record [n]: its gradients [n, dim], learning rate, stream of random rounding, id, and how much of its
    values it keeps, where tables decay."""

    grads: Tensor
    rates: Tensor
    streams: Tensor
    ids: Tensor
    kept: Tensor | None = None


def _step_group(block: Tensor, group: RowLayout, begin: int, batch: Batch, settings: Sequence[float]) -> None:
    if is_plain(group):
        values = _floats(block, group.values_at, group.dim)
        state = _floats(block, group.state_at, group.state_floats)
        _step(group.optimizer, values, state, batch, settings)
        _put(block, group.values_at, values)
        _put(block, group.state_at, state)
        return
    parts = Parts(block[:, begin : begin + group.bytes], group)
    values = dequantised(parts.codes, parts.scales, group.format, group.dim)
    _step(group.optimizer, values, parts.state, batch, settings)
    parts.codes = _codes(values, parts, group, batch.streams, batch.ids)
    if group.moments:  # always stochastic, and after the draws of the values
        draws = random.draws_of(random.row_key(batch.streams, batch.ids), group.moments, group.dim)
        parts.state[:, : group.moments] = rounded(parts.state[:, : group.moments], None, "bf16", draws).float()
    block[:, begin : begin + group.bytes] = parts.bytes(group)


def _step(optimizer: str, values: Tensor, state: Tensor, batch: Batch, settings: Sequence[float]) -> None:
    """Apply one step to values and state of rows, in place, at the rate of each."""
    if batch.kept is not None:
        decay(optimizer, values, state, batch.kept, settings)
    rates = batch.rates.unique().tolist()
    for rate in rates:
        own = (batch.rates == rate).nonzero().flatten()
        w, s = values[own], state[own]
        optimizer_step(optimizer, w, s, batch.grads[own], [rate, *settings[1:]])
        values[own], state[own] = w, s


def _floats(block: Tensor, begin: int, count: int) -> Tensor:
    if not count:  # a tensor without elements has strides that no other type fits
        return torch.empty((block.shape[0], 0), device=block.device)
    part = _copied(block[:, begin : begin + 4 * count])
    return part.view(torch.float32).reshape(block.shape[0], count)


def _put(block: Tensor, begin: int, values: Tensor) -> None:
    block[:, begin : begin + 4 * values.shape[1]] = values.contiguous().view(torch.uint8).reshape(len(block), -1)
