"""Messages of ids from each rank to each other one: write all of a rank's, and read those that came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_index
from tessera.kernels.message_layout import MessageLayout, layout_of
from tessera.kernels.reference import message as reference


class Owners(NamedTuple):
    """Which of `ranks` ranks an id goes to: its bits as an unsigned number, modulo `world`, divided by `each` and taken
    modulo `ranks`."""

    ranks: int
    world: int
    each: int = 1


class PackedIds(NamedTuple):
    """message: int64 [ranks, words], one for each rank; order: int64 [n], the places of ids in the order of ranks, of
    each in their own order; places: int64 [n], where each stands in that order; parts: int64 [ranks], how many."""

    message: Tensor
    order: Tensor
    places: Tensor
    parts: Tensor


class IdsThatCame(NamedTuple):
    """ids: int64 [n], kind after kind, of each in the order of ranks; bounds: int64 [kinds + 1] of kinds; order: int64
    [n], where each stood when they came, rank after rank; ranks: int64 [n], which rank sent it; columns: [n] each, as
    whole numbers of the columns' sizes."""

    ids: Tensor
    bounds: Tensor
    order: Tensor
    ranks: Tensor
    columns: tuple[Tensor, ...]


def owner_of(mixed: Tensor, world_size: int) -> Tensor:
    """Return the rank that owns each id: its 64 mixed bits, read as an unsigned number, modulo the number of ranks.

    mixed: int64 [n], `mix64` of raw ids. torchrec's input dist computes the same on what is sent through it.
    """
    return reference.owner_of(mixed, world_size)


def pack_ids(
    ids: Tensor, bounds: Tensor, columns: Sequence[Tensor], told: Tensor, owners: Owners, layout: MessageLayout
) -> PackedIds:
    """Return the messages in which ids go to their owners.

    ids: int64 [n], those of kind k at bounds[k] to bounds[k + 1] - 1, int64 [kinds + 1]; columns: [n] each, of the
    layout's sizes; told: float64 [layout.told], for all ranks. Ids beyond the layout's room are counted in the header
    alone; what lies in room that no id takes is undefined. On a GPU there may be ids from bounds[-1] on, as
    `unique_tables(..., padded=True)` leaves them: they go to no rank, are last in `order`, and have place 0. Raises
    ValueError for wrong arguments.
    """
    check_index("ids", ids)
    check_index("bounds", bounds)
    if told.dtype != torch.float64 or told.numel() != layout.told or bounds.numel() != layout.kinds + 1:
        expected = f"float64 [{layout.told}] and bounds [{layout.kinds + 1}]"
        raise ValueError(f"told: expected {expected}, found {told.dtype} {list(told.shape)} and {list(bounds.shape)}")
    sizes = tuple(column.element_size() for column in columns)
    if sizes != layout.sizes or any(column.shape != ids.shape for column in columns):
        raise ValueError(f"columns: expected {ids.numel()} elements of {layout.sizes} bytes, found {sizes}")
    ops = backend.ops_for(ids) or reference
    return PackedIds(*ops.pack_ids(ids, bounds, columns, told, owners, layout.numbers))


def read_ids(message: Tensor, late: Tensor, count: int, layout: MessageLayout) -> IdsThatCame:
    """Return the ids of the messages that came.

    message: int64 [ranks, words], from each rank; late: int32 [ids, sum of layout.late_units], those that had no room,
    rank after rank, with numbers of 2 bytes as int32; count: how many ids came in all. Raises ValueError for messages
    that contradict themselves or these, IndexError for a kind out of range; on a GPU they are not looked for.
    """
    if message.dtype != torch.int64 or message.dim() != 2 or message.shape[1] != layout.words:
        found = f"{message.dtype} {list(message.shape)}"
        raise ValueError(f"message: expected int64 [ranks, {layout.words}], found {found}")
    if late.dtype != torch.int32:
        raise ValueError(f"late: expected int32, found {late.dtype}")
    ops = backend.ops_for(message) or reference
    ids, bounds, order, ranks, *columns = ops.read_ids(message, late, count, layout.numbers)
    return IdsThatCame(ids, bounds, order, ranks, tuple(columns))


@torch.library.register_fake("tessera::pack_ids")
def _pack_ids_fake(
    ids: Tensor, bounds: Tensor, columns: list[Tensor], told: Tensor, owners: Sequence[int], layout: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    message = ids.new_empty((owners[0], layout_of(layout).words))
    return message, torch.empty_like(ids), torch.empty_like(ids), ids.new_empty(owners[0])


@torch.library.register_fake("tessera::read_ids")
def _read_ids_fake(message: Tensor, late: Tensor, count: int, layout: Sequence[int]) -> list[Tensor]:
    shape = layout_of(layout)
    columns = [message.new_empty(count, dtype=reference.WHOLE[size]) for size in shape.sizes]
    ids, order, ranks = (message.new_empty(count) for _ in range(3))
    return [ids, message.new_empty(shape.kinds + 1), order, ranks, *columns]
