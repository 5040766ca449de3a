"""Constants of a model's id features, on the device of the batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor


class OnDevice:
    """A small constant that is sent to a device once, not in every step: the host would wait for a GPU each time."""

    def __init__(self, values: Sequence[int] | Sequence[bool]) -> None:
        self.values = list(values)
        are_bool = all(isinstance(value, bool) for value in self.values)
        self._tensor = torch.tensor(self.values, dtype=torch.bool if are_bool else torch.int32)

    def on(self, device: torch.device) -> Tensor:
        """Return the values as bool [n] or, as torchrec wants places of keys, int32 [n], on `device`."""
        if self._tensor.device != device:
            self._tensor = self._tensor.to(device)
        return self._tensor

    def of(self, values: Tensor) -> Tensor:
        """Return values[these places]; `values` [n, ...] itself if they are all of it, in order."""
        return values if self.values == list(range(len(values))) else values[self.on(values.device)]


def chosen(ids: KeyedJaggedTensor, fields: OnDevice) -> KeyedJaggedTensor:
    """Return the bags of some fields (given by their places), in this order."""
    return ids.permute(fields.values, fields.on(ids.values().device))


def scale_to_mean(ids: KeyedJaggedTensor, averaged: OnDevice) -> Tensor:
    """Return float32 [fields, B]: 1 / bag length for averaged fields, 1 elsewhere; an empty bag counts as one of length
    1.

    averaged: of each key of `ids`, in order, whether its bags are averaged.
    """
    lengths_fb = ids.lengths().view(len(averaged.values), -1)
    averaged_f1 = averaged.on(lengths_fb.device).unsqueeze(1)
    return torch.where(averaged_f1, 1.0 / lengths_fb.clamp_min(1), 1.0)
