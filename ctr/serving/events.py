"""The events of sequences that a tower sees one by one, as an exported graph takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tessera.ctr.data.bags import Bags
from tessera.ctr.data.schema import Feature, gives_ids
from tessera.ctr.serving.embeddings import Embeddings

PLACES = 1 << 24  # of pairs of events of a row that one pass holds in memory, for each head of attention


@dataclass(frozen=True)
class EventInputs:
    """One group of aligned sequences of n rows. lengths: int64 [n]; tensors: of each group of embeddings each sequence
    of ids, float32 [events, dim], then each sequence of numbers, float32 [events]."""

    lengths: Tensor
    tensors: list[Tensor]

    @classmethod
    def empty(cls, group: Sequence[Feature], dims: Sequence[int]) -> EventInputs:
        """Return the events of no rows. dims: of the groups of embeddings."""
        ids = sum(gives_ids(feature) for feature in group)
        tensors = [torch.zeros(0, dim) for dim in dims for _ in range(ids)]
        return cls(torch.zeros(0, dtype=torch.int64), tensors + [torch.zeros(0) for _ in range(len(group) - ids)])

    def repeated(self, rows: int) -> EventInputs:
        """Return the events of one row for each of so many."""
        return EventInputs(
            self.lengths.repeat(rows), [one.repeat(rows, *[1] * (one.dim() - 1)) for one in self.tensors]
        )

    def slice(self, begin: int, end: int) -> EventInputs:
        """Return those of some rows."""
        first = int(self.lengths[:begin].sum())
        last = first + int(self.lengths[begin:end].sum())
        return EventInputs(self.lengths[begin:end], [one[first:last] for one in self.tensors])


def tensors_of(group: Sequence[Feature], bags: Mapping[str, Bags], embeddings: Embeddings) -> EventInputs:
    """Look up the events of decoded rows."""
    ids = [feature.name for feature in group if gives_ids(feature)]
    numbers = [torch.from_numpy(bags[feature.name].values) for feature in group if not gives_ids(feature)]
    lengths = torch.from_numpy(np.diff(bags[ids[0]].offsets).astype(np.int64))
    return EventInputs(lengths, embeddings.one_by_one(bags, ids) + numbers)


def joined_events(parts: Sequence[Sequence[EventInputs]]) -> list[EventInputs]:
    """Return the events of all rows, of those of several parts."""
    if len(parts) == 1:
        return list(parts[0])
    joined = []
    for of_group in zip(*parts, strict=True):
        tensors = [torch.cat(list(some)) for some in zip(*(one.tensors for one in of_group), strict=True)]
        joined.append(EventInputs(torch.cat([one.lengths for one in of_group]), tensors))
    return joined


def passes(numeric: Tensor, groups: Sequence[Tensor], events: Sequence[EventInputs]) -> Iterator[list[Tensor]]:
    """Yield the inputs of a graph, in its order, of so many rows at a time as fit the memory."""
    if not events:
        yield [numeric, *groups]
        return
    longest = max(2, *(int(one.lengths.max()) for one in events))
    at_once = max(1, PLACES // longest**2)
    for begin in range(0, numeric.shape[0], at_once):
        end = min(begin + at_once, numeric.shape[0])
        inputs = [numeric[begin:end], *(group[begin:end] for group in groups)]
        for one in events:
            part = one.slice(begin, end)
            inputs += [part.lengths, torch.arange(max(2, int(part.lengths.max()))), *part.tensors]
        yield inputs
