"""Base of gates that learn on batches of the valid split, which the weights do not learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tessera.ctr.selection.field_groups import FieldGroup
from tessera.ctr.selection.gates import FieldGates

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # of Adam


class HeldOutGates(FieldGates):
    """Weights learn from training batches with the gates held fixed; every few steps the gates learn from a batch of
    the valid split with the weights held fixed (first order), by an Adam of their own.

    Attributes:
        learned: what gates are made of. No parameter: the training loss has no say in it.
    """

    learned: Tensor
    moments: Tensor
    updates: Tensor

    def __init__(self, groups: Sequence[FieldGroup], starts_at: Tensor, lr: float) -> None:
        super().__init__(groups)
        self._lr = lr
        self.register_buffer("learned", starts_at)
        self.register_buffer("moments", torch.zeros(2, *starts_at.shape))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._leaf: Tensor | None = None

    @contextmanager
    def learning(self, seed: int, step: int) -> Iterator[Tensor]:
        """Have gates for a batch of the valid split inside the context. Yields what its loss has a gradient to."""
        self._leaf = self.learned.detach().clone().requires_grad_()
        try:
            yield self._leaf
        finally:
            self._leaf = None

    @torch.no_grad()
    def learn(self, gradient: Tensor) -> None:
        """Run one step of Adam. gradient: of the mean loss of the valid batch, of the shape of `learned`."""
        self.updates += 1
        self.moments[0].lerp_(gradient, 1 - BETA1)
        self.moments[1].lerp_(gradient.square(), 1 - BETA2)
        first = self.moments[0] / (1 - BETA1**self.updates)
        second = self.moments[1] / (1 - BETA2**self.updates)
        self.learned -= self._lr * first / (second.sqrt() + EPS)
