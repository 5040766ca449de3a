"""Rates of the rows that were trained since the last log line, predicted before their update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ctr.data.batch import Batch
from tessera.ctr.data.labels import Label
from tessera.ctr.metrics.score_table import entropy
from tessera.ctr.metrics.streaming import LOGIT_CLIP
from tessera.ctr.metrics.tasks import answers_of, label_of, logit_of

KEPT = 64  # batches whose logits wait for their sums: few operations for each of them


class WindowedRates:
    """Normalized entropy and calibration over a window of rows, as `StreamingMetrics` defines them.

    A step keeps logits, labels and weights of its batch and computes nothing. Sums are made of many batches at once,
    on the device, and read where a log line waits for it anyway.

    Attributes:
        sums: float64 [answers, 4], of this rank's rows: loss, prediction, positives, weight.
    """

    def __init__(self, labels: Sequence[Label], shift: float, device: torch.device | str) -> None:
        """shift: is added to logits, as the loss does where negatives were left out of the data."""
        self._labels, self._shift = tuple(labels), shift
        self._answers = [one for one in answers_of(labels) if not one.label.is_number]
        self.sums = torch.zeros((len(self._answers), 4), dtype=torch.float64, device=device)
        self._kept: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Add a batch. logits: [B] or [B, T], of the model."""
        if not self._answers:
            return
        self._kept.append((logits.detach(), batch.labels, batch.known, batch.weight))
        if len(self._kept) == KEPT:
            self.make_sums()

    @torch.no_grad()
    def make_sums(self) -> Tensor:
        """Return `sums`, with all rows that were added."""
        kept, self._kept = self._kept, []
        if not kept:
            return self.sums
        logits, labels = torch.cat([one for one, _, _, _ in kept]), torch.cat([one for _, one, _, _ in kept])
        weight = torch.cat([one for _, _, _, one in kept])
        masks = [one for _, _, one, _ in kept if one is not None]
        known_bt = torch.cat(masks) if masks else None  # the schema decides: of all batches or of none
        for answer, sums in zip(self._answers, self.sums, strict=True):
            value, counted = label_of(answer, self._labels, labels, known_bt, weight)
            logit = (logit_of(answer, self._labels, logits) + self._shift).double()
            value, counted = torch.where(counted > 0, value, 0).double(), counted.double()
            clipped = logit.clamp(-LOGIT_CLIP, LOGIT_CLIP)
            loss = F.softplus(clipped) - value * clipped
            parts = (loss * counted, torch.sigmoid(logit) * counted, value * counted, counted)
            sums += torch.stack([part.sum() for part in parts])
        return self.sums

    def take(self) -> dict[str, float | None]:
        """Return the rates by name, of several labels as `buy.calibration`, and begin a new window; None where
        undefined. `sums` are those of all ranks."""
        found: dict[str, float | None] = {}
        for answer, (loss, prediction, positives, weight) in zip(self._answers, self.sums.tolist(), strict=True):
            both = 0 < positives < weight
            of_rate = entropy(positives, weight - positives) if both else None
            found[answer.key("normalized_entropy")] = loss / weight / of_rate if of_rate else None
            found[answer.key("calibration")] = prediction / positives if positives > 0 else None
        self.sums.zero_()
        return found
