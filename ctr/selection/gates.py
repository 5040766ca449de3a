"""Gates on the fields of any tower, trained beside it: one factor for each field, by which its vectors are multiplied.

A gate stands for all that is one field of the ranking (`field_groups.py`), and is applied wherever the tower reads it:
to the vectors of every group of embeddings, first-order weights among them, and to those of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tessera.ctr.models.tower import Fields, Tower
from tessera.ctr.selection.field_groups import FieldGroup, places_of
from tessera.ctr.selection.field_vectors import FieldVectors, per_field
from tessera.embedding.config import key_of
from tessera.kernels.random import row_keys, uniform

GATES = key_of("gates of fields")
STARTS_AT = -2.0  # theta of concrete dropout: sigmoid(-2), a field is dropped in 12 rows of 100
SMALLEST = 2.0**-25  # draws are multiples of 2^-24, and their logarithm must be finite
EPS_EVERY, ALPHA, TAU = 100, 10.0, 2.0  # of LPFS


class FieldGates(nn.Module):
    """Base of the gates, which leaves all fields as they are: frozen at 1.

    Attributes:
        groups: the fields, in the order of the gates.
        embedding_dims: groups of embeddings that the gates want beside the tower's.
    """

    method = "none"
    embedding_dims: Mapping[str, int] = {}

    def __init__(self, groups: Sequence[FieldGroup]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self._places = places_of(groups)  # no buffer: it is no part of what is saved
        self._now: Tensor | None = None

    def forward(self, site: str, first: int, vectors: Tensor, rows: Tensor | None) -> Tensor:
        """Return vectors times their gates: a `Change`."""
        assert self._now is not None  # `attach` has it made before the tower reads
        factor = per_field(self._now, self._places, first, vectors.shape[1], rows)
        return vectors * factor.to(vectors.dtype)

    def begin_pass(self, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Make the gates of a forward pass. Return other inputs for the tower, or None for these.

        inputs: those of `Tower.forward`.
        """
        self._places = self._places.to(inputs[0].device)
        self._now = self.now()
        return None

    def begin_step(self, seed: int, step: int, place: Tensor | None) -> None:
        """Say which step of training the next pass is of, and where in the epoch's order its rows stand."""

    def now(self) -> Tensor:
        """Return the gates, [groups], or [B, groups] where rows have gates of their own."""
        return torch.ones(len(self.groups), device=self._places.device)

    def penalty(self) -> Tensor | float:
        """Return what is added to the loss, summed over the rows of the global batch."""
        return 0.0

    def after_step(self, lr: float) -> None:
        """Do what follows the optimizer's step, whose learning rate this is."""

    def importance(self) -> Tensor:
        """Return a number per group, [groups]; the higher, the more important."""
        return self.now().detach().abs()


class ConcreteDropout(FieldGates):
    """Drop a field in a row with a probability that is learned (TorchEasyRec's variational dropout).

        p = sigmoid(theta),  u ~ U(0, 1) of each row and field
        d = sigmoid((ln p - ln(1 - p) + ln u - ln(1 - u)) / temperature)
        e <- e (1 - d) in training, e (1 - p) elsewhere;   L <- L + lambda / B sum_f (1 - p_f)

    The added term pays for dropping; a field stays where the labels pay more. theta begins at -2, not at a draw from
    N(0, 1), so that no field is ahead by luck. u follows from (seed, step, the row's place, field), whatever the
    number of ranks.
    """

    method = "dropout"

    def __init__(self, groups: Sequence[FieldGroup], penalty: float, temperature: float) -> None:
        super().__init__(groups)
        self._penalty, self._temperature = penalty, temperature
        self.theta = nn.Parameter(torch.full((len(groups),), STARTS_AT))
        self._keys: Tensor | None = None

    def begin_step(self, seed: int, step: int, place: Tensor | None) -> None:
        assert place is not None, "the reader does not say where the rows stand"
        self._keys = row_keys(seed, GATES, place, step)

    def now(self) -> Tensor:
        if not self.training or self._keys is None:
            return torch.sigmoid(-self.theta)
        u = uniform(0, GATES, self._keys, len(self.groups)).clamp(min=SMALLEST)
        return torch.sigmoid(-(self.theta + torch.log(u) - torch.log1p(-u)) / self._temperature)

    def penalty(self) -> Tensor:
        return self._penalty * torch.sigmoid(-self.theta).sum()

    def importance(self) -> Tensor:
        return torch.sigmoid(-self.theta.detach())


class LPFS(FieldGates):
    """Learned factors that a proximal step pulls to 0 (Guo et al., arXiv 2206.00267), by the smoothed-l0 gate

        g(x) = sgn(x) x^2 / (x^2 + eps) + alpha eps^(1 / tau) atan(x),   x = 1 at first,  eps falling

    The second term keeps a gradient at 0, so that a field can come back. As published, g(1) is 3.39 at first and scales
    all embeddings up; here the gate is g(x) / g(1), which is 1 at first whatever eps is.
    """

    step: Tensor
    method = "lpfs"

    def __init__(self, groups: Sequence[FieldGroup], threshold: float, eps: float, eps_decay: float) -> None:
        super().__init__(groups)
        self._threshold, self._eps, self._decay = threshold, eps, math.log(eps_decay)
        self.x = nn.Parameter(torch.ones(len(groups)))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def now(self) -> Tensor:
        eps = self._eps * torch.exp(self._decay * (self.step // EPS_EVERY))
        return _smoothed(self.x, eps) / _smoothed(torch.ones_like(self.x[:1]), eps)

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        self.x.copy_(self.x.sign() * (self.x.abs() - self._threshold * lr).clamp(min=0))
        self.step += 1


def _smoothed(x: Tensor, eps: Tensor) -> Tensor:
    square = x.square()
    return x.sign() * square / (square + eps) + ALPHA * eps ** (1 / TAU) * torch.atan(x)


def attach(gates: FieldGates, tower: Tower, fields: Fields, numeric_class: type | None) -> None:
    """Have a tower read its fields through gates, which become a part of it, `field_gates`."""
    vectors = FieldVectors(tower, fields, numeric_class)
    tower.field_gates = gates
    tower.embedding_dims = {**tower.embedding_dims, **gates.embedding_dims}
    tower.register_forward_pre_hook(lambda _, inputs: gates.begin_pass(inputs))
    vectors.change(gates)


def gates_of(tower: nn.Module) -> FieldGates | None:
    """Return the gates that a tower reads its fields through."""
    found = getattr(tower, "field_gates", None)
    return found if isinstance(found, FieldGates) else None
