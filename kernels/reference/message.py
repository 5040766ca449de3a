"""Write and read messages of ids in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels.message_layout import FIXED, LARGEST, PART, TOTAL, WORD, MessageLayout, layout_of

WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def owner_of(mixed: Tensor, world_size: int) -> Tensor:
    if world_size & (world_size - 1) == 0:
        return mixed & (world_size - 1)
    # 2^64 = 2 * 2^63, so for a negative number the unsigned value is (x + 2^63) + 2^63.
    half = 2**63 % world_size
    low = torch.remainder(mixed & (2**63 - 1), world_size)
    return torch.where(mixed < 0, torch.remainder(low + half, world_size), low)


def pack_ids(
    ids: Tensor,
    bounds: Tensor,
    columns: Sequence[Tensor],
    told: Tensor,
    owners: Sequence[int],
    layout: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, (ranks, world, each) = layout_of(layout), owners
    owner = owner_of(ids, world) // each % ranks
    parts = torch.bincount(owner, minlength=ranks)
    order = owner.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=ids.device)
    kinds = torch.arange(shape.kinds, device=ids.device).repeat_interleave(bounds.diff())
    message = ids.new_zeros(ranks, shape.words)
    message[:, PART], message[:, TOTAL], message[:, LARGEST] = parts, ids.numel(), parts.max()
    message[:, FIXED : FIXED + shape.told] = told.view(torch.int64)
    if not shape.numbered:
        counts = torch.bincount(owner * shape.kinds + kinds, minlength=ranks * shape.kinds)
        _ends(message, shape).copy_(counts.view(ranks, shape.kinds).cumsum(1))
    place = places - (parts.cumsum(0) - parts)[owner]  # in the part
    fits = place < shape.room
    given = [ids, *columns]
    if shape.numbered:
        given.append(kinds.to(WHOLE[shape.columns[-1]]))
    for column, begin in zip(given, shape.begins, strict=True):
        whole, each_word = WHOLE[column.element_size()], WORD // column.element_size()
        at = (owner * shape.words + begin) * each_word + place
        message.view(-1).view(whole)[at[fits]] = column.view(whole)[fits]
    return message, order, places, parts


def read_ids(message: Tensor, late: Tensor, count: int, layout: Sequence[int]) -> list[Tensor]:
    shape = layout_of(layout)
    parts = message[:, PART].contiguous()
    if int(parts.sum()) != count or int(parts.min()) < 0:
        raise ValueError(f"count: expected {int(parts.sum())} ids, found {count}")
    missing = (parts - shape.room).clamp(min=0)
    if late.numel() != int(missing.sum()) * sum(shape.late_units):
        expected = [int(missing.sum()), sum(shape.late_units)]
        raise ValueError(f"late: expected int32 {expected}, found {list(late.shape)}")
    ranks = torch.arange(len(parts), device=parts.device).repeat_interleave(parts)
    place = torch.arange(count, device=parts.device) - (parts.cumsum(0) - parts)[ranks]
    row = (missing.cumsum(0) - missing)[ranks] + place - shape.room  # in `late`
    columns = [_column(message, late, number, (ranks, place, row), shape) for number in range(len(shape.columns))]
    if shape.numbered:
        kinds = columns.pop().long()
        if count and not 0 <= int(kinds.min()) <= int(kinds.max()) < shape.kinds:
            raise IndexError(f"message: expected kinds below {shape.kinds}, found {int(kinds.max())}")
    else:
        ends = _ends(message, shape).long()
        counts = ends.diff(dim=1, prepend=ends.new_zeros(len(ends), 1))
        if bool((counts < 0).any()) or bool((ends[:, -1] != parts).any()):
            raise ValueError("message: expected ends of kinds to ascend to the number of ids")
        kinds = torch.arange(shape.kinds, device=parts.device).repeat(len(ends)).repeat_interleave(counts.flatten())
    order = kinds.argsort(stable=True)
    bounds = parts.new_zeros(shape.kinds + 1)
    bounds[1:] = torch.bincount(kinds, minlength=shape.kinds).cumsum(0)
    ids, *others = [column[order] for column in columns]
    return [ids, bounds, order, ranks[order], *others]


def _ends(message: Tensor, shape: MessageLayout) -> Tensor:
    begin = 2 * (FIXED + shape.told)
    return message.view(torch.int32)[:, begin : begin + shape.kinds]


def _column(
    message: Tensor, late: Tensor, number: int, where: tuple[Tensor, Tensor, Tensor], shape: MessageLayout
) -> Tensor:
    """Return a column of the ids that came, in the order of ranks. where: rank, place and row in `late` of each."""
    (ranks, place, row), size = where, shape.columns[number]
    at = (ranks * shape.words + shape.begins[number]) * (WORD // size) + place
    found = message.view(-1).view(WHOLE[size])
    values = found[torch.where(place < shape.room, at, 0)] if found.numel() else found.new_zeros(len(place))
    behind = place >= shape.room
    if late.numel():
        first = sum(shape.late_units[:number])
        units = late.view(-1, sum(shape.late_units))[row[behind], first : first + shape.late_units[number]]
        values[behind] = units[:, 0].to(values.dtype) if size < WORD else units.contiguous().view(torch.int64)[:, 0]
    return values
