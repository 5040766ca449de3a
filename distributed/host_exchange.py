"""Send ids to their owners in two stages, so that what the ranks of a host have in common leaves it once.

A rank sends each id to the rank of its host that has the owner's place there; that one merges what came and sends it
to the owner, who is in the group of ranks with its own place. Rows come back the same way, and gradients are summed
where ids were merged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.distributed.event_times import latest, packed, unpacked
from tessera.distributed.hosts import HostGroups
from tessera.distributed.id_exchange import HostRoute, IdExchange, OutgoingIds, ReceivedIds, Route, SentIds
from tessera.kernels.message import Owners
from tessera.kernels.unique import unique_tables


class HostExchange:
    """The exchanges of one collection whose ids have one column, `packed` counts and times. Used as `IdExchange`."""

    def __init__(self, groups: HostGroups) -> None:
        each = groups.inside.size()
        self.ranks = each * groups.between.size()
        self._inside = IdExchange(groups.inside, owners=Owners(each, self.ranks))
        self.between = IdExchange(groups.between, owners=Owners(groups.between.size(), self.ranks, each))

    def send(self, outgoing: OutgoingIds) -> SentByHost:
        """Begin to send ids to the ranks of this host. Collective."""
        told = 0 if outgoing.told is None else outgoing.told.numel()
        return SentByHost(self, self._inside.send(outgoing), told)


class SentByHost:
    """Ids on their way, as `SentIds`. The second stage begins when `told` or `received` is asked for first."""

    def __init__(self, exchange: HostExchange, inside: SentIds, told: int) -> None:
        self._exchange, self._inside, self._told = exchange, inside, told
        self._between: tuple[SentIds, Tensor, Route] | None = None
        self._received: ReceivedIds | None = None

    @property
    def told(self) -> Tensor:
        return self._merged()[0].told.view(self._exchange.ranks, self._told)

    def received(self) -> ReceivedIds:
        if self._received is None:
            between, index, inside = self._merged()
            came = between.received()
            assert isinstance(came.route, Route)
            route = HostRoute(came.route, index, inside)
            self._received = ReceivedIds(came.ids, came.columns, came.bounds, came.order, came.ranks, route)
        return self._received

    def _merged(self) -> tuple[SentIds, Tensor, Route]:
        """Return the second stage, begun, with the rest of `HostRoute`."""
        if self._between is None:
            told, came = self._inside.told, self._inside.received()
            assert came.order is not None and isinstance(came.route, Route)
            unique, places, _, found = unique_tables(came.ids, came.bounds, padded=True)
            counts, times = unpacked(came.columns[0])
            counts = torch.zeros_like(unique).index_add_(0, places, counts.long())
            times = None if times is None else latest(times, places, unique.numel())
            outgoing = OutgoingIds(unique, found, (packed(counts, times),), told.flatten())
            index = torch.empty_like(places).index_copy_(0, came.order, places)
            self._between = self._exchange.between.send(outgoing), index, came.route
        return self._between
