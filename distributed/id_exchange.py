"""Send each id to the rank that owns it, with what goes with it and what ranks tell each other, in one message.

An answer, such as rows, goes back in the same order (`Route`). Ids are of several kinds, tables for example, and arrive
kind by kind, of each in the order of ranks. One operation writes all messages of a rank and one reads those that came
(`kernels/message.py`); the orders of ids that they give serve answers and gradients too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tessera.distributed.message_room import RecentSizes
from tessera.kernels.host_numbers import HostCopy
from tessera.kernels.message import Owners, PackedIds, pack_ids, read_ids
from tessera.kernels.message_layout import FIXED, LARGEST, PART, TOTAL, MessageLayout

_layout = lru_cache(maxsize=64)(MessageLayout)


@dataclass(frozen=True)
class Route:
    """How what is sent for ids and what is answered go between the ranks of a group. asked, owned: how many ids went to
    and came from each rank; order: int64, the places of this rank's ids in the order in which they went; places: int64,
    where each of them stands in that order, 0 for what is padded."""

    asked: list[int]
    owned: list[int]
    order: Tensor
    places: Tensor
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
    """ids: int64 [n], mixed, those of kind k from bounds[k] on, int64 [kinds + 1]; on a GPU what is there from
    bounds[-1] on is not sent. columns: [n] each, those of larger numbers first. told: float64, as many numbers on every
    rank; None: none."""

    ids: Tensor
    bounds: Tensor
    columns: tuple[Tensor, ...]
    told: Tensor | None = None


class IdExchange:
    """The exchanges of one collection; all ranks make the same ones in the same order, with columns of one type.

    has_room: messages have room for ids; otherwise all ids go in a second exchange, which is exact. owners: which rank
    of the group mixed ids go to; their owner, if not given."""

    def __init__(self, group: dist.ProcessGroup, *, has_room: bool = True, owners: Owners | None = None) -> None:
        self.group, self.ranks, self.has_room = group, group.size(), has_room
        self.owners = owners or Owners(self.ranks, self.ranks)
        self.recent = RecentSizes()
        self._nothing: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def nothing(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return what stands for nothing told, float64 [0], and for nothing that came late, int32 [0, 1]."""
        if device not in self._nothing:
            none = torch.empty(0, dtype=torch.float64, device=device)
            self._nothing[device] = none, torch.empty((0, 1), dtype=torch.int32, device=device)
        return self._nothing[device]

    def send(self, outgoing: OutgoingIds) -> SentIds:
        """Begin to send ids to their owners. Collective."""
        ids, columns = outgoing.ids, outgoing.columns
        told = self.nothing(ids.device)[0] if outgoing.told is None else outgoing.told
        sizes = tuple([column.element_size() for column in columns])
        room = self.recent.room() if self.has_room else 0
        layout = _layout(room, outgoing.bounds.numel() - 1, told.numel(), sizes)
        if told.device != ids.device:
            told = told.to(ids.device, non_blocking=True)
        return SentIds(self, layout, outgoing, pack_ids(ids, outgoing.bounds, columns, told, self.owners, layout))


class SentIds:
    """Ids on their way. told: what each rank has told, float64 [ranks, n] on the host; `received` waits for all."""

    def __init__(self, exchange: IdExchange, layout: MessageLayout, outgoing: OutgoingIds, packed: PackedIds) -> None:
        self._exchange, self._layout, self._outgoing, self._packed = exchange, layout, outgoing, packed
        self._came = torch.empty_like(packed.message)
        self._work = dist.all_to_all_single(self._came, packed.message, group=exchange.group, async_op=True)
        self._copy = None if self._came.device.type == "cpu" else self._copied()
        self._headers: NDArray[np.int64] | None = None
        self._late: Tensor | None = None
        self._late_work: dist.Work | None = None
        self._received: ReceivedIds | None = None

    @property
    def told(self) -> Tensor:
        return torch.from_numpy(self._arrived()[:, FIXED:].copy().view(np.float64))

    def _copied(self) -> HostCopy:
        """Begin to copy headers, and how many ids went to each rank, to the host. On a GPU only its stream waits."""
        self._work.wait()
        headers = self._came[:, : FIXED + self._layout.told]
        return HostCopy(torch.cat([headers, self._packed.parts.unsqueeze(1)], 1))

    def _arrived(self) -> NDArray[np.int64]:
        """Return the headers that came but for ends of kinds, on the host, which waits; send what had no room."""
        if self._headers is not None:
            return self._headers
        end = FIXED + self._layout.told
        if self._copy is None:
            self._work.wait()
            headers, parts = self._came.numpy(), self._packed.parts.numpy()
            self._sent = self._packed.order.numel()
        else:
            headers = self._copy.read().numpy()
            parts = headers[:, end]
            self._sent = int(parts.sum())
        numbers = self._headers = headers[:, :end].copy()  # numpy takes a fraction of what torch's operations do
        self._asked, self._owned = parts.tolist(), numbers[:, PART].tolist()
        self._count = int(numbers[:, PART].sum())
        largest, room = int(numbers[:, LARGEST].max()), self._layout.room
        self._exchange.recent.note(int(numbers[:, TOTAL].sum()) / self._exchange.ranks**2, largest)
        if largest > room:  # the same on all ranks
            self._send_late(room)
        return self._headers

    def _send_late(self, room: int) -> None:
        ids, kinds = self._outgoing.ids, self._layout.kinds
        total, order = self._sent, self._packed.order[: self._sent]
        columns = [ids, *self._outgoing.columns]
        if self._layout.numbered:
            numbers = torch.arange(kinds, dtype=torch.int32, device=ids.device)
            columns.append(torch.repeat_interleave(numbers, self._outgoing.bounds.diff(), output_size=total))
        if room:
            parts = self._packed.parts
            ranks = torch.repeat_interleave(parts, output_size=total)
            place = torch.arange(total, device=ids.device) - (parts.cumsum(0) - parts)[ranks]
            order = order[place >= room]
        sent = torch.cat([_units(column.index_select(0, order)) for column in columns], 1)
        owned, asked = ([max(0, count - room) for count in counts] for counts in (self._owned, self._asked))
        self._late = sent.new_empty(sum(owned), sent.shape[1])
        group = self._exchange.group
        self._late_work = dist.all_to_all_single(self._late, sent, owned, asked, group=group, async_op=True)

    def received(self) -> ReceivedIds:
        """Return the ids that came. On a GPU the host waits for their numbers alone."""
        if self._received is None:
            self._arrived()
            self._received = self._read()
            del self._packed, self._came, self._outgoing, self._late
        return self._received

    def _read(self) -> ReceivedIds:
        if self._late_work is not None:
            self._late_work.wait()
        late = self._exchange.nothing(self._came.device)[1] if self._late is None else self._late
        came = read_ids(self._came, late, self._count, self._layout)
        given = zip(came.columns, self._outgoing.columns, strict=True)
        columns = [one if one.dtype == sent.dtype else one.view(sent.dtype) for one, sent in given]
        order = self._packed.order
        order = order if self._sent == order.numel() else order[: self._sent]
        route = Route(self._asked, self._owned, order, self._packed.places, self._exchange.group)
        return ReceivedIds(came.ids, tuple(columns), came.bounds, came.order, came.ranks, route)


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
