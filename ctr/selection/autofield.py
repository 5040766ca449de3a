"""AutoField (Wang et al., WWW 2022): keep or drop each field, learned on batches that the weights do not learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tessera.ctr.selection.field_groups import FieldGroup
from tessera.ctr.selection.gates import GATES, SMALLEST
from tessera.ctr.selection.held_out import HeldOutGates
from tessera.kernels.random import uniform

COLDEST = 0.01
OF_TRAINING, OF_VALID = 0, 1


class AutoField(HeldOutGates):
    """Each field is kept with probability p, drawn relaxed once for a batch; p begins at 1/2 for all fields.

        (g, 1 - g) = softmax((ln p + n_1, ln(1 - p) + n_2) / t),   n = -ln(-ln u),  t = max(0.01, 1 - cooling x step)
        e <- e g in training, e p elsewhere

    u follows from (seed, step, field), whatever the number of ranks.
    """

    method = "autofield"

    def __init__(self, groups: Sequence[FieldGroup], lr: float, cooling: float) -> None:
        super().__init__(groups, torch.zeros(len(groups), 2), lr)
        self._cooling = cooling
        self._draw: tuple[int, int] | None = None

    def begin_step(self, seed: int, step: int, place: Tensor | None) -> None:
        self._draw = (seed, step)

    def now(self) -> Tensor:
        if self._leaf is not None:
            return self._drawn(self._leaf, OF_VALID)
        if self.training and self._draw is not None:
            return self._drawn(self.learned, OF_TRAINING)
        return self.importance()

    def importance(self) -> Tensor:
        return torch.softmax(self.learned, 1)[:, 0]

    @contextmanager
    def learning(self, seed: int, step: int) -> Iterator[Tensor]:
        self._draw = (seed, step)
        with super().learning(seed, step) as leaf:
            yield leaf

    def _drawn(self, logits: Tensor, which: int) -> Tensor:
        assert self._draw is not None
        seed, step = self._draw
        fields = torch.arange(len(self.groups), device=logits.device)
        u = uniform(seed, GATES, fields, 4, step)[:, 2 * which : 2 * which + 2].clamp(min=SMALLEST)
        temperature = max(COLDEST, 1 - self._cooling * step)
        return torch.softmax((torch.log_softmax(logits, 1) - torch.log(-torch.log(u))) / temperature, 1)[:, 0]
