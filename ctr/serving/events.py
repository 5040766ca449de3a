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
    """One group of aligned sequences of some rows. lengths: int64 [n]; tensors: of each group of embeddings each
    sequence of ids, float32 [events, dim], then each sequence of numbers, float32 [events]; matrices: of the first of
    these, what makes rows as wide as the tower wants, None where they are; rows: of the sequences, None: n; else n is
    1, and every row has the events of one user, which are looked up once and repeated for the rows of a pass alone.
    """

    lengths: Tensor
    tensors: list[Tensor]
    matrices: list[Tensor | None]
    rows: int | None = None

    @classmethod
    def empty(cls, group: Sequence[Feature], dims: Sequence[int]) -> EventInputs:
        """Return the events of no rows. dims: of the groups of embeddings."""
        ids = sum(gives_ids(feature) for feature in group)
        tensors = [torch.zeros(0, dim) for dim in dims for _ in range(ids)]
        tensors += [torch.zeros(0) for _ in range(len(group) - ids)]
        return cls(torch.zeros(0, dtype=torch.int64), tensors, [None] * (ids * len(dims)))

    @property
    def count(self) -> int:
        """Rows of the sequences."""
        return self.lengths.shape[0] if self.rows is None else self.rows

    def of_rows(self, begin: int, end: int) -> EventInputs:
        """Return those of some rows, each with its own events, as wide as the tower wants them."""
        if self.rows is None:
            first = int(self.lengths[:begin].sum())
            last = first + int(self.lengths[begin:end].sum())
            lengths, tensors = self.lengths[begin:end], [one[first:last] for one in self.tensors]
        else:
            times = end - begin
            lengths = self.lengths.repeat(times)
            tensors = [one.repeat(times, *[1] * (one.dim() - 1)) for one in self.tensors]
        wide = [one if by is None else one @ by for one, by in zip(tensors, self.matrices, strict=False)]
        return EventInputs(lengths, wide + tensors[len(wide) :], [None] * len(wide))


def tensors_of(
    group: Sequence[Feature], bags: Mapping[str, Bags], embeddings: Embeddings, rows: int | None = None
) -> EventInputs:
    """Look up the events of decoded rows; rows: of one, for so many that have the same."""
    ids = [feature.name for feature in group if gives_ids(feature)]
    numbers = [torch.from_numpy(bags[feature.name].values) for feature in group if not gives_ids(feature)]
    lengths = torch.from_numpy(np.diff(bags[ids[0]].offsets).astype(np.int64))
    found, matrices = embeddings.one_by_one(bags, ids)
    return EventInputs(lengths, found + numbers, matrices, rows)


def _of_pass(parts: Sequence[EventInputs], begin: int, end: int) -> EventInputs:
    """Return the events of some rows of several parts, one behind the other."""
    found, first = [], 0
    for part in parts:
        low, high = max(begin - first, 0), min(end - first, part.count)
        if low < high:
            found.append(part.of_rows(low, high))
        first += part.count
    if len(found) == 1:
        return found[0]
    tensors = [torch.cat(list(some)) for some in zip(*(one.tensors for one in found), strict=True)]
    return EventInputs(torch.cat([one.lengths for one in found]), tensors, found[0].matrices)


def passes(
    numeric: Tensor, groups: Sequence[Tensor], events: Sequence[Sequence[EventInputs]], most: int
) -> Iterator[list[Tensor]]:
    """Yield the inputs of a graph, in its order, of so many rows at a time as fit the memory.

    events: of each group of sequences the parts, whose rows are those of `numeric` one behind the other. most: rows.
    """
    longest = max([2, *(int(part.lengths.max()) for parts in events for part in parts if part.count)])
    at_once = max(1, min(most, PLACES // longest**2 if events else most))
    for begin in range(0, numeric.shape[0], at_once):
        end = min(begin + at_once, numeric.shape[0])
        inputs = [numeric[begin:end], *(group[begin:end] for group in groups)]
        for parts in events:
            part = _of_pass(parts, begin, end)
            inputs += [part.lengths, torch.arange(max(2, int(part.lengths.max()))), *part.tensors]
        yield inputs
