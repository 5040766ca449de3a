"""Batches that a step may see before their turn, to begin with the next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.ctr.data.batch import Batch


class LookAhead:
    """Passes batches on. `peek` is the one that comes next."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._next: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.peek()) is not None:
            self._next = None
            yield batch

    def peek(self) -> Batch | None:
        """The next batch, read if it was not yet; None at the end."""
        if self._next is None:
            self._next = next(self._batches, None)
        return self._next


@dataclass
class ReadyBatch:
    """A batch on its device, and what all ranks know of its step.

    batch: as it was read; sent: what of it is on its way to other ranks, if anything; times: int64 [B] of its events on
    the device, if rows are touched with them; weight: summed over the global batch; now: what time it is for the
    tables, in seconds; stop: whether to leave after its step.
    """

    batch: Batch
    on_device: Batch
    sent: Any
    times: Tensor | None
    weight: float
    now: int
    stop: bool


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device. The host does not wait for what a GPU has to do before the copy, and keeps what it
    would have to ask the GPU for later."""
    if device.type != "cuda":
        return batch.to(device)
    batch.ids.offset_per_key()  # kept by the batch, and taken over by its copies
    return batch.pin_memory().to(device, non_blocking=True)
