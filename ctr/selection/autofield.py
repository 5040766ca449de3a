"""AutoField (Wang et al., WWW 2022): keep or drop each field, learned on batches that the weights do not learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tessera.ctr.selection.field_groups import FieldGroup
from tessera.ctr.selection.gates import GATES, SMALLEST, FieldGates
from tessera.kernels.random import uniform

COLDEST = 0.01
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # of Adam
OF_TRAINING, OF_VALID = 0, 1


class AutoField(FieldGates):
    """Each field is kept with probability p, drawn relaxed once for a batch; p begins at 1/2 for all fields.

        (g, 1 - g) = softmax((ln p + n_1, ln(1 - p) + n_2) / t),   n = -ln(-ln u),  t = max(0.01, 1 - cooling x step)
        e <- e g in training, e p elsewhere

    Weights learn from training batches with p held fixed; every few steps p learns from a batch of the valid split with
    the weights held fixed (first order), by an Adam of its own. u follows from (seed, step, field), whatever the number
    of ranks.
    """

    logits: Tensor
    moments: Tensor
    updates: Tensor
    method = "autofield"

    def __init__(self, groups: Sequence[FieldGroup], lr: float, cooling: float) -> None:
        super().__init__(groups)
        self._lr, self._cooling = lr, cooling
        # No parameters: the training loss has no say in them.
        self.register_buffer("logits", torch.zeros(len(groups), 2))
        self.register_buffer("moments", torch.zeros(2, len(groups), 2))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._draw: tuple[int, int] | None = None
        self._leaf: Tensor | None = None

    def begin_step(self, seed: int, step: int, place: Tensor | None) -> None:
        self._draw = (seed, step)

    def now(self) -> Tensor:
        if self._leaf is not None:
            return self._drawn(self._leaf, OF_VALID)
        if self.training and self._draw is not None:
            return self._drawn(self.logits, OF_TRAINING)
        return self.importance()

    def importance(self) -> Tensor:
        return torch.softmax(self.logits, 1)[:, 0]

    @contextmanager
    def learning(self, seed: int, step: int) -> Iterator[Tensor]:
        """Draw gates for a batch of the valid split inside the context. Yields what its loss has a gradient to."""
        self._draw, self._leaf = (seed, step), self.logits.detach().clone().requires_grad_()
        try:
            yield self._leaf
        finally:
            self._leaf = None

    @torch.no_grad()
    def learn(self, gradient: Tensor) -> None:
        """Run one step of Adam. gradient: of the mean loss of the valid batch, [groups, 2]."""
        self.updates += 1
        self.moments[0].lerp_(gradient, 1 - BETA1)
        self.moments[1].lerp_(gradient.square(), 1 - BETA2)
        first = self.moments[0] / (1 - BETA1**self.updates)
        second = self.moments[1] / (1 - BETA2**self.updates)
        self.logits -= self._lr * first / (second.sqrt() + EPS)

    def _drawn(self, logits: Tensor, which: int) -> Tensor:
        assert self._draw is not None
        seed, step = self._draw
        fields = torch.arange(len(self.groups), device=logits.device)
        u = uniform(seed, GATES, fields, 4, step)[:, 2 * which : 2 * which + 2].clamp(min=SMALLEST)
        temperature = max(COLDEST, 1 - self._cooling * step)
        return torch.softmax((torch.log_softmax(logits, 1) - torch.log(-torch.log(u))) / temperature, 1)[:, 0]
