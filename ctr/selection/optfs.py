"""OptFS (Lyu et al., WWW 2023): a gate for each id, not for each field, so that rows are dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tessera.ctr.models.tower import Fields
from tessera.ctr.selection.field_groups import FieldGroup
from tessera.ctr.selection.gates import FieldGates
from tessera.distributed.collectives import ranks, sum_over_ranks
from tessera.embedding.errors import ConfigError

GROUP = "gate"  # of embeddings: one more column of each row
STARTS_AT = 0.5
KEPT_OF_MEAN = 0.99  # of the running means by field, in each step


class OptFS(FieldGates):
    """Each id has a weight w, which begins at 0.5, in its row.

        g(w) = sigmoid(w tau) / sigmoid(0.5),  tau rising from 1 to `sharpest`;   L <- L + l1 sum |w| over look-ups
        e <- e g(w);   an id with w <= 0 is dropped in the end

    tau = sharpest^(step / steps). A row stores w - 0.5, drawn around 0 as all its columns are. A bag has one gate, of
    its pooled weight; a number has one, as a dense weight.
    """

    step: Tensor
    mean: Tensor
    method = "optfs"

    def __init__(self, groups: Sequence[FieldGroup], fields: Fields, l1: float, sharpest: float, steps: int) -> None:
        super().__init__(groups)
        if fields.sequences:
            raise ConfigError(
                f"selection.method is optfs, and {fields.sequences[0].ids[0]!r} is read event by event (pooling: "
                "none); expected pooling: mean or sum, or another method"
            )
        self.embedding_dims = {GROUP: 1} if fields.ids else {}
        self._numbers, self._l1 = len(fields) - len(fields.ids), l1
        self._growth, self._steps = math.log(sharpest), steps
        if self._numbers:
            self.w = nn.Parameter(torch.full((self._numbers,), STARTS_AT))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.full((len(groups),), STARTS_AT))
        self._stored: Tensor | None = None
        self._rows = 0

    def begin_pass(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        numeric, embeddings, *events = inputs
        self._places, self._rows = self._places.to(numeric.device), numeric.shape[0]
        stored = embeddings.get(GROUP)
        self._stored = None if stored is None else stored.squeeze(2)
        return (numeric, {name: one for name, one in embeddings.items() if name != GROUP}, *events)

    def forward(self, site: str, first: int, vectors: Tensor, rows: Tensor | None) -> Tensor:
        if first < self._numbers:
            factor = self.gate(self.w[first : first + vectors.shape[1]]).view(1, -1, 1)
        else:
            assert self._stored is not None  # `begin_pass` has it before the tower reads
            factor = self.gate(STARTS_AT + self._stored).unsqueeze(2)
        return vectors * factor.to(vectors.dtype)

    def gate(self, w: Tensor) -> Tensor:
        """Return g(w) at this step."""
        tau = torch.exp(self._growth * (self.step / self._steps).clamp(max=1))
        return torch.sigmoid(w * tau) / (1 / (1 + math.exp(-STARTS_AT)))

    def penalty(self) -> Tensor:
        total = torch.zeros((), device=self.step.device)
        if self._stored is not None:
            total = total + (STARTS_AT + self._stored).abs().sum()
        if self._numbers:
            total = total + self._rows * self.w.abs().sum()
        return self._l1 * ranks() * total  # each rank has its own rows

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        sums = torch.zeros(2, len(self.groups), device=self.step.device)
        if self._stored is not None:
            there = self._stored != 0  # a row's first value is a draw; 0 is what an empty bag reads
            weights = (STARTS_AT + self._stored).clamp(min=0) * there
            of_ids = self._places[self._numbers :]
            sums[0].index_add_(0, of_ids, weights.sum(0))
            sums[1].index_add_(0, of_ids, there.sum(0, dtype=sums.dtype))
        sum_over_ranks(sums)
        if self._numbers:
            of_numbers = self._places[: self._numbers]
            sums[0].index_add_(0, of_numbers, self.w.clamp(min=0))
            sums[1].index_add_(0, of_numbers, torch.ones_like(self.w))
        now = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), self.mean)
        self.mean.lerp_(now, 1 - KEPT_OF_MEAN)
        self.step += 1
        self._stored = None

    def importance(self) -> Tensor:
        return self.mean
