"""Keep an exponential moving average of the dense weights beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

KEY = "average"  # the last part of its names in states


class DenseAverage:
    """The average of dense weights: after step t of the run it keeps d = min(decay, t / (t + 9)) of itself and takes
    1 - d of the weights, so that the first weights do not stay in it for long. It begins as the weights behind the
    first step. The same on all ranks, as the weights are.
    """

    def __init__(self, decay: float, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
        self._decay, self._names = decay, list(names)
        self._parameters: list[Tensor] = list(parameters)
        self._values: list[Tensor] | None = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights behind a step, the first one being 1."""
        if self._values is None:
            self._values = [parameter.detach().clone() for parameter in self._parameters]
        else:
            torch._foreach_lerp_(self._values, self._parameters, 1 - min(self._decay, step / (step + 9)))

    def state(self) -> dict[str, Tensor]:
        """Return the live values, parameter/average -> tensor; nothing before the first step."""
        return {f"{name}/{KEY}": value for name, value in zip(self._names, self._values or (), strict=False)}

    @torch.no_grad()
    def load(self, found: Mapping[str, Tensor]) -> None:
        """Take over averages, parameter/average -> tensor; of weights that are not among them, the average begins with
        what they are now. Nothing found: it begins behind the next step."""
        self._values = None
        if found:
            self._values = [parameter.detach().clone() for parameter in self._parameters]
            for name, value in zip(self._names, self._values, strict=True):
                if f"{name}/{KEY}" in found:
                    value.copy_(found[f"{name}/{KEY}"])

    @torch.no_grad()
    def replace_weights(self) -> None:
        """Write the average over the weights. Nothing before the first step."""
        if self._values is not None:
            torch._foreach_copy_(self._parameters, self._values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the average in the place of the weights, inside the block alone."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self.replace_weights()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, kept)
