"""One batch: what the reader hands to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """B rows of one rank, of which the first `rows` are real.

    The others pad the batch so that every rank takes a step of the same size: their weight is 0, their bags
    are empty, their numeric values and labels are 0.
    """

    numeric: Tensor  # [B, n] float32
    ids: KeyedJaggedTensor  # keys Schema.id_names, int64 values, int32 lengths, weights if Schema.weighted
    labels: Tensor  # [B, T] float32, 0 or 1 (any number where the loss is mse); 0 where it is not known
    weight: Tensor  # [B] float32 sample weight
    group: Tensor | None  # [B] int64
    time: Tensor | None  # [B] int64, seconds
    rows: int
    # Rows of the epoch, over all ranks, up to and with this batch. A loop that reads ahead asks the reader
    # for the state after the batch it trained last: reader.state(batch).
    position: int = 0
    # [B] int64, of the row in the data set (-1: padding), if the reader is asked for it. It stays on the host, where
    # what is kept by row number lies.
    number: Tensor | None = None
    # [B] int64: where each row stands in the epoch's order, the same on any number of ranks (padding: 0).
    place: Tensor | None = None
    known: Tensor | None = None  # [B, T] bool: which labels are; None: all of them
    # Sequences of numbers by name, float32 [events]: their lengths are those of the ids that they are aligned with.
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        return self._map(lambda t: t.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        own = (self.numeric, self.ids, self.labels, self.weight, self.group, self.time, self.place, self.known)
        for tensor in (*own, *self.numbers.values()):
            if tensor is not None:
                tensor.record_stream(stream)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            numeric=move(self.numeric),
            ids=move(self.ids),
            labels=move(self.labels),
            weight=move(self.weight),
            group=None if self.group is None else move(self.group),
            time=None if self.time is None else move(self.time),
            rows=self.rows,
            position=self.position,
            number=self.number,
            place=None if self.place is None else move(self.place),
            known=None if self.known is None else move(self.known),
            numbers={name: move(values) for name, values in self.numbers.items()},
        )
