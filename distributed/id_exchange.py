"""Send each id to the rank that owns it, with what goes with it and what ranks tell each other, in one message.

An answer, such as rows, goes back in the same order (`Route`). Ids are of several kinds, tables for example, and arrive
kind by kind, of each in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.distributed.message_layout import FIXED, LARGEST, PART, TOTAL, MessageLayout, RecentSizes
from tessera.distributed.ownership import owner_of
from tessera.kernels.unique import positions_of

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_layout = lru_cache(maxsize=64)(MessageLayout)


@dataclass(frozen=True)
class Route:
    """How what is sent for ids and what is answered go between the ranks of a group. asked, owned: how many ids went to
    and came from each rank; order: int64, the places of this rank's ids in the order in which they went."""

    asked: list[int]
    owned: list[int]
    order: Tensor
    group: dist.ProcessGroup


@dataclass(frozen=True)
class HostRoute:
    """The same in two stages: between hosts for the ids of a host, each once, and inside it for those of its ranks.
    index: int64, for each id that came inside the host, in the order in which they came, its place between hosts."""

    between: Route
    index: Tensor
    inside: Route


@dataclass(frozen=True)
class ReceivedIds:
    """Ids that this rank owns. ids: int64 [n], those of kind k at bounds[k] to bounds[k + 1] - 1, int64 [kinds + 1];
    columns: what goes with each; order: int64 [n], where each stood among those that came, None: there. ranks: int64
    [n], which rank sent each; route: both None on one rank."""

    ids: Tensor
    columns: tuple[Tensor, ...]
    bounds: Tensor
    order: Tensor | None = None
    ranks: Tensor | None = None
    route: Route | HostRoute | None = None


@dataclass(frozen=True)
class OutgoingIds:
    """ids: int64 [n], mixed, those of kind k from bounds[k] on, int64 [kinds + 1]. columns: [n] each, those of larger
    numbers first. told: float64, as many numbers on every rank."""

    ids: Tensor
    bounds: Tensor
    columns: tuple[Tensor, ...]
    told: Tensor


class IdExchange:
    """The exchanges of one collection; all ranks make the same ones in the same order, with columns of one type.

    has_room: messages have room for ids; otherwise all ids go in a second exchange, which is exact. receiver: mixed ids
    [n] -> the rank of the group that each goes to, int64 [n]; their owner, if not given."""

    def __init__(
        self, group: dist.ProcessGroup, *, has_room: bool = True, receiver: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.group, self.ranks, self.has_room = group, group.size(), has_room
        self.receiver = receiver or partial(owner_of, world_size=self.ranks)
        self.recent = RecentSizes()

    def send(self, outgoing: OutgoingIds) -> SentIds:
        """Begin to send ids to their owners. Collective."""
        ids, kinds = outgoing.ids, outgoing.bounds.numel() - 1
        sizes = tuple(column.element_size() for column in outgoing.columns)
        layout = _layout(self.recent.room() if self.has_room else 0, kinds, outgoing.told.numel(), sizes)
        owners = self.receiver(ids)
        parts = occurrences(owners, self.ranks)
        order, begins = positions_of(owners, parts)
        kind = torch.repeat_interleave(outgoing.bounds.diff(), output_size=ids.numel())
        columns = (ids, *outgoing.columns)
        if layout.numbered:
            columns += (kind.to(_WHOLE[layout.number_bytes]),)
        message = ids.new_empty(self.ranks * layout.words + 1)  # the last word takes what has no room
        header = message[:-1].view(self.ranks, layout.words)[:, : layout.header]
        largest = parts.amax(0, keepdim=True)
        of_all = [parts.sum(0, keepdim=True), largest]
        if layout.told:
            of_all.append(outgoing.told.view(torch.int64).to(ids.device, non_blocking=True))
        header[:, TOTAL : FIXED + layout.told].copy_(torch.cat(of_all))
        header.select(1, PART).copy_(parts)
        if not layout.numbered:
            of_kinds = occurrences(owners * kinds + kind, self.ranks * kinds)
            _counts(header, layout).copy_(of_kinds.view(self.ranks, kinds))
        owners = owners.index_select(0, order)
        places = torch.arange(order.numel(), device=ids.device).sub_(begins.index_select(0, owners))
        columns = tuple([column.index_select(0, order) for column in columns])
        fits = ids.device.type == "cpu" and int(largest) <= layout.room
        rows = owners * layout.words
        for column, begin in zip(columns, layout.begins if layout.room else (), strict=layout.room > 0):
            flat, each = message.view(_WHOLE[column.element_size()]), 8 // column.element_size()
            at = torch.add(places, rows, alpha=each).add_(begin * each)
            if not fits:
                at = torch.where(places < layout.room, at, flat.numel() - 1)
            flat.scatter_(0, at, column.view(flat.dtype))
        return SentIds(self, layout, message[:-1], columns, _Order(order, parts, places))


@dataclass(frozen=True)
class _Order:
    """order: the ids' places in the order of ranks; parts: how many each rank gets; places: of ids in their part."""

    order: Tensor
    parts: Tensor
    places: Tensor


class SentIds:
    """Ids on their way. told: what each rank has told, float64 [ranks, n] on the host; `received` waits for all."""

    def __init__(
        self, exchange: IdExchange, layout: MessageLayout, message: Tensor, columns: tuple[Tensor, ...], order: _Order
    ) -> None:
        self._exchange, self._layout, self._columns, self._order = exchange, layout, columns, order
        self._message, self._came = message, torch.empty_like(message)
        self._work = dist.all_to_all_single(self._came, message, group=exchange.group, async_op=True)
        self._headers: Tensor | None = None  # on the host
        self._rest: tuple[dist.Work | None, Tensor] | None = None
        self._received: ReceivedIds | None = None

    @property
    def told(self) -> Tensor:
        headers = self._arrived()
        return headers[:, FIXED:].contiguous().view(torch.float64)

    def _arrived(self) -> Tensor:
        """Return the headers that came but for counts of kinds, on the host, which waits; send what had no room."""
        if self._headers is not None:
            return self._headers
        self._work.wait()
        self._message = self._came = self._came.view(self._exchange.ranks, self._layout.words)
        self._headers = self._came[:, : FIXED + self._layout.told].cpu()
        self._asked, self._owned = self._order.parts.tolist(), self._headers[:, PART].tolist()
        self._count, total, _ = self._headers[:, :FIXED].sum(0).tolist()
        largest = int(self._headers[:, LARGEST].max())
        ranks, room = self._exchange.ranks, self._layout.room
        self._exchange.recent.note(total / ranks**2, largest)
        if largest > room:  # the same on all ranks
            self._send_rest(room)
        return self._headers

    def _send_rest(self, room: int) -> None:
        late = (self._order.places >= room).nonzero().squeeze(1)
        sent = torch.cat([_units(column[late]) for column in self._columns], 1)
        owned, asked = ([max(0, count - room) for count in counts] for counts in (self._owned, self._asked))
        came = sent.new_empty(sum(owned), sent.shape[1])
        work = dist.all_to_all_single(came, sent, owned, asked, group=self._exchange.group, async_op=True)
        self._rest = work, came

    def received(self) -> ReceivedIds:
        """Return the ids that came. On a GPU the host waits for their numbers alone."""
        if self._received is None:
            self._arrived()
            self._received = self._read()
            del self._message, self._came, self._columns, self._rest
        return self._received

    def _read(self) -> ReceivedIds:
        layout, count, device = self._layout, self._count, self._came.device
        if self._rest is not None and self._rest[0] is not None:
            self._rest[0].wait()
        parts = self._came.select(1, PART).contiguous()
        ranks = torch.repeat_interleave(parts, output_size=count)
        begins = (parts.cumsum(0) - parts).index_select(0, ranks)
        places = torch.arange(count, device=device).sub_(begins)
        if layout.numbered:
            kinds = self._column(len(layout.columns) - 1, _WHOLE[layout.number_bytes], ranks, places).long()
            order, bounds = positions_of(kinds, occurrences(kinds, layout.kinds))
        else:
            counts = _counts(self._came, layout).long()
            order, bounds = in_order_of_kinds(counts, count), counts.new_zeros(layout.kinds + 1)
            torch.cumsum(counts.sum(0), 0, out=bounds[1:])
        ranks, places = ranks.index_select(0, order), places.index_select(0, order)
        types = [torch.int64, *(column.dtype for column in self._columns[1:])]
        columns = [self._column(i, types[i], ranks, places) for i in range(1 + len(layout.sizes))]
        route = Route(self._asked, self._owned, self._order.order, self._exchange.group)
        return ReceivedIds(columns[0], tuple(columns[1:]), bounds, order, ranks, route)

    def _column(self, number: int, dtype: torch.dtype, ranks: Tensor, places: Tensor) -> Tensor:
        """Return what came in a column from `ranks` at their `places`."""
        layout = self._layout
        whole = _WHOLE[layout.columns[number]]
        flat, each = self._came.view(-1).view(whole), 8 // layout.columns[number]
        at = torch.add(places, ranks, alpha=layout.words * each).add_(layout.begins[number] * each)
        if self._rest is None:
            return flat.index_select(0, at).view(dtype)
        late = [max(0, count - layout.room) for count in self._owned]
        shift = torch.tensor([0, *accumulate(late)][:-1], device=flat.device) - layout.room + flat.numel()
        units = [max(1, size // 4) for size in layout.columns[: number + 1]]
        rest = self._rest[1][:, sum(units[:-1]) : sum(units)].contiguous().view(-1)
        both = torch.cat([flat, rest.view(whole) if whole.itemsize >= 4 else rest.to(whole)])
        return both[torch.where(places < layout.room, at, places + shift[ranks])].view(dtype)


def _units(column: Tensor) -> Tensor:
    """Return numbers of 2, 4 or 8 bytes as int32 [n, 1 or 2]."""
    size = column.element_size()
    return (column.int() if size == 2 else column.view(torch.int32)).view(len(column), max(1, size // 4))


def occurrences(numbers: Tensor, kinds: int) -> Tensor:
    """Return how often each number below `kinds` occurs: int64 [kinds], without waiting for a GPU as bincount does."""
    if numbers.device.type == "cpu":
        return torch.bincount(numbers, minlength=kinds)
    counts = torch.zeros(kinds, dtype=torch.int64, device=numbers.device)
    return counts.index_add_(0, numbers, torch.ones_like(numbers))


def _counts(header: Tensor, layout: MessageLayout) -> Tensor:
    """Return the part of headers (int64 [ranks, words]) that says how many ids are of each kind: int32 [ranks, kinds],
    not copied."""
    begin = 2 * (FIXED + layout.told)
    return header.view(torch.int32)[:, begin : begin + layout.kinds]


def in_order_of_kinds(lengths_rk: Tensor, count: int) -> Tensor:
    """Return the places of `count` ids in the order of kinds, and of ranks in each: int64 [count].

    lengths_rk: int64 [ranks, kinds], of what stands one behind the other, of each rank kind after kind.
    """
    lengths = lengths_rk.flatten()
    begins_kr = (lengths.cumsum(0) - lengths).view_as(lengths_rk).t().flatten()
    lengths_kr = lengths_rk.t().flatten()
    shift = begins_kr - (lengths_kr.cumsum(0) - lengths_kr)
    return torch.arange(count, device=lengths.device) + shift.repeat_interleave(lengths_kr, output_size=count)
