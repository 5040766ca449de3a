"""Send the ids of bags to the ranks that own them, each with the row that it is of, and put bags together there.

Every occurrence of an id travels, so one owner gets all of a frequent one. No room fits such parts, so the header goes
first, with how many ids follow (`IdExchange` without room).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable

from tessera.distributed.event_times import times_of_values
from tessera.distributed.id_exchange import IdExchange, OutgoingIds, SentIds, occurrences
from tessera.distributed.torchrec.ready import Ready
from tessera.kernels.host_numbers import on_device
from tessera.kernels.mix import mix64


@dataclass(frozen=True)
class AskedBags:
    """bags: raw ids; times: int64 [B] of their rows, or None; told: float64 [n], what this rank tells all others."""

    bags: KeyedJaggedTensor
    times: Tensor | None = None
    told: Tensor | None = None


class OwnedBags(KeyedJaggedTensor):
    """The parts of all ranks' bags that this rank owns: mixed ids, a key for each feature, the rows of one rank behind
    the other's. times: int64 [values] of their rows, or None. rows_of_ranks: of each rank's batch."""

    times: Tensor | None
    rows_of_ranks: list[int]


def owned_alone(asked: AskedBags) -> OwnedBags:
    """Return the bags of a single rank."""
    ids = asked.bags
    times = None if asked.times is None else times_of_values(ids, asked.times)
    return _owned(ids.keys(), mix64(ids.values()), ids.weights_or_none(), ids.lengths(), times, [ids.stride()])


def send_bags(exchange: IdExchange, asked: AskedBags) -> SentBags:
    """Begin to send bags to their owners. Collective."""
    ids, rows = asked.bags, asked.bags.stride()
    of_rows = torch.arange(rows, dtype=torch.int32, device=ids.values().device)
    columns = [] if asked.times is None else [times_of_values(ids, asked.times)]
    columns.append(times_of_values(ids, of_rows))
    if ids.weights_or_none() is not None:
        columns.append(ids.weights())
    bounds = on_device(ids.offset_per_key(), ids.values().device)
    mine = torch.tensor([rows], dtype=torch.float64)
    told = mine if asked.told is None else torch.cat([mine, asked.told])
    sent = exchange.send(OutgoingIds(mix64(ids.values()), bounds, tuple(columns), told))
    return SentBags(sent, ids.keys(), asked.times is not None)


class SentBags(Awaitable[Awaitable[KJTList]]):
    """told: what all ranks told, float64 [ranks, n], on the host."""

    def __init__(self, sent: SentIds, keys: list[str], timed: bool) -> None:  # noqa: FBT001 (of what is sent)
        super().__init__()
        self._sent, self._keys, self._timed = sent, keys, timed

    @property
    def told(self) -> Tensor:
        return self._sent.told[:, 1:]

    def _wait_impl(self) -> Awaitable[KJTList]:
        received = self._sent.received()
        columns = list(received.columns)
        times = columns.pop(0) if self._timed else None
        rows_of_ranks = [int(rows) for rows in self._sent.told[:, 0].tolist()]
        stride, device = sum(rows_of_ranks), received.ids.device
        assert received.ranks is not None
        rows = on_device([0, *accumulate(rows_of_ranks)], device)[received.ranks] + columns.pop(0)
        lengths = received.bounds.diff()
        of_features = torch.arange(len(self._keys), device=device).repeat_interleave(lengths, output_size=rows.numel())
        bags = occurrences(of_features * stride + rows, len(self._keys) * stride).int()
        weights = columns.pop(0) if columns else None
        return Ready(KJTList([_owned(self._keys, received.ids, weights, bags, times, rows_of_ranks)]))


def _owned(
    keys: list[str],
    ids: Tensor,
    weights: Tensor | None,
    lengths: Tensor,
    times: Tensor | None,
    rows_of_ranks: list[int],
) -> OwnedBags:
    owned = OwnedBags(keys, ids, weights, lengths=lengths, stride=sum(rows_of_ranks))
    owned.times, owned.rows_of_ranks = times, rows_of_ranks
    return owned
