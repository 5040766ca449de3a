"""Correct the logits of a trained tower, so that probabilities are those that are observed: a part of the tower itself,
which evaluation, scores, exports and the server have without a step of their own.

    Platt      z' = a z + b                     (Platt, Probabilistic Outputs for Support Vector Machines, 1999)
    isotonic   p' = f(z), f rises from knot to knot   (Zadrozny and Elkan, KDD 2002)

It does nothing while the tower trains, and nothing before it is fitted (`tessera.ctr.train.calibrate`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.tower import Tower

KNOTS = 4096  # of isotonic, at most
LEAST = 1e-7  # isotonic probabilities end here and at 1 - this, where others would have an infinite logit
KINDS = ("none", "platt", "isotonic")


class Calibration(nn.Module, ABC):
    """Base of both kinds: logits [B] or [B, labels] -> the same shape, float32. Each label has a function of its own;
    one that was not fitted leaves its logits as they are, bit for bit."""

    fitted: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.zeros(labels))

    @property
    def labels(self) -> int:
        """Return the number of labels."""
        return len(self.fitted)

    def forward(self, logits: Tensor) -> Tensor:
        raw = logits.float()
        by_label = raw.reshape(-1, self.labels)
        return torch.where(self.fitted > 0, self.corrected(by_label), by_label).reshape(raw.shape)

    @abstractmethod
    def corrected(self, logits_bt: Tensor) -> Tensor:
        """Return corrected logits [B, labels] of raw ones, float32."""

    @torch.no_grad()
    def reset(self) -> None:
        """Forget what was fitted."""
        self.fitted.zero_()


class Platt(Calibration):
    """z' = slope z + intercept."""

    slope: Tensor
    intercept: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__(labels)
        self.register_buffer("slope", torch.ones(labels))
        self.register_buffer("intercept", torch.zeros(labels))

    def corrected(self, logits_bt: Tensor) -> Tensor:
        return logits_bt * self.slope + self.intercept

    @torch.no_grad()
    def set(self, label: int, slope: float, intercept: float) -> None:
        """Take over what was fitted for a label, by its number."""
        self.slope[label], self.intercept[label], self.fitted[label] = slope, intercept, 1


class Isotonic(Calibration):
    """Probabilities that are straight between knots and constant outside of them; equal ones where the labels of the
    data do not rise, so that rows tie that did not before."""

    logit: Tensor
    probability: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__(labels)
        self.register_buffer("logit", torch.zeros(labels, KNOTS))
        self.register_buffer("probability", torch.full((labels, KNOTS), 0.5))

    def corrected(self, logits_bt: Tensor) -> Tensor:
        by_label = [self._of_label(logits_bt[:, label], label) for label in range(self.labels)]
        return torch.stack(by_label, dim=1)

    def _of_label(self, logit_b: Tensor, label: int) -> Tensor:
        knots, values = self.logit[label], self.probability[label]
        below = torch.zeros_like(logit_b, dtype=torch.int64)
        half = KNOTS // 2
        while half:  # a binary search in plain operations: ONNX has none of its own
            below = torch.where(knots[below + half] <= logit_b, below + half, below)
            half //= 2
        above = (below + 1).clamp(max=KNOTS - 1)
        low, high = knots[below], knots[above]
        width = high - low
        share = torch.where(width > 0, (logit_b - low) / torch.where(width > 0, width, 1.0), 1.0).clamp(0, 1)
        found = values[below] + share * (values[above] - values[below])
        found = found.clamp(LEAST, 1 - LEAST)
        return found.log() - torch.log1p(-found)

    @torch.no_grad()
    def set(self, label: int, logit: Sequence[float], probability: Sequence[float]) -> None:
        """Take over the knots of a label, by its number: at most KNOTS, by rising logit. The last fills the rest."""
        count = len(logit)
        for stored, values in ((self.logit, logit), (self.probability, probability)):
            stored[label, :count] = torch.as_tensor(values, dtype=torch.float32)
            stored[label, count:] = stored[label, count - 1].clone()
        self.fitted[label] = 1


def attach_calibration(tower: Tower, kind: str, labels: int) -> None:
    """Make a calibration part of a tower, `tower.calibration`. kind: platt | isotonic."""
    tower.calibration = Platt(labels) if kind == "platt" else Isotonic(labels)
    tower.register_forward_hook(_calibrate)


def calibration_of(tower: Tower) -> Calibration | None:
    """Return the calibration of a tower, None without one."""
    found = getattr(tower, "calibration", None)
    return found if isinstance(found, Calibration) else None


def _calibrate(tower: nn.Module, _inputs: object, logits: Tensor) -> Tensor | None:
    if tower.training:
        return None
    found = tower.calibration
    assert isinstance(found, Calibration)
    return found(logits)
