"""Metrics of a stream of batches on any number of ranks, in memory that does not grow with the rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ctr.data.errors import DataError
from ctr.metrics.score_table import entropy

BINS = 1 << 16
# Beyond 16 a float32 probability is within 1e-7 of 0 or 1; logits further out share the outermost bins.
LOGIT_LIMIT = 16.0


class StreamingMetrics:
    """AUC from a histogram of logits; logloss, normalized entropy and calibration from exact float64 sums.

    Bins are of equal width in logits. Inside a bin a positive is taken to beat half of the negatives, so AUC
    is off by at most half of the pairs that share a bin: `auc_error_bound` = sum_i P_i N_i / (2 P N).
    `update` never waits for the device; `compute` waits once.

    The whole state is one float64 vector of sums, so that ranks merge by one all_reduce:
    negatives per bin, positives per bin, then loss, prediction, rows, positives, rows that are not finite.
    """

    def __init__(self, bins: int = BINS, device: torch.device | str | None = None) -> None:
        assert bins > 0
        self.bins = bins
        self._state = torch.zeros(2 * bins + 5, dtype=torch.float64, device=device)
        self._reduced = False

    def to(self, device: torch.device | str) -> StreamingMetrics:
        self._state = self._state.to(device)
        return self

    def reset(self) -> None:
        self._state.zero_()
        self._reduced = False

    @torch.no_grad()
    def update(self, logit: Tensor, label: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch; it may be empty.

        Args:
            logit: floating [B].
            label: [B] of 0 and 1.
            weight: floating [B], not negative, or None for 1 each. Rows of weight 0 (padding) change nothing,
                whatever they hold.
        """
        assert not self._reduced, "update after all_reduce would count rows twice; call reset first"
        logit, label = logit.reshape(-1).double(), label.reshape(-1).double()
        weight = torch.ones_like(logit) if weight is None else weight.reshape(-1).double()
        counted = weight > 0
        # A NaN must not reach the sums (0 * NaN is NaN) or, through a cast, a bin number: it is counted.
        finite = torch.isfinite(logit) & torch.isfinite(label)
        usable = counted & finite
        logit, label, weight = (torch.where(usable, values, 0.0) for values in (logit, label, weight))
        position = (logit + LOGIT_LIMIT) * (self.bins / (2 * LOGIT_LIMIT))
        bin_of_row = position.clamp(0, self.bins - 1).long() + self.bins * (label > 0.5)
        self._state.index_add_(0, bin_of_row, weight)
        loss = F.softplus(logit) - label * logit
        sums = (weight * loss, weight * torch.sigmoid(logit), usable, usable * label, counted & ~finite)
        self._state[2 * self.bins :] += torch.stack([values.double().sum() for values in sums])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the other ranks' rows, in one collective; without a process group there are none."""
        assert not self._reduced, "a second all_reduce would count rows twice; call reset first"
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._state, group=group)
        self._reduced = True

    def compute(self) -> dict[str, float | None]:
        """The metrics of all rows so far.

        Returns:
            auc, auc_error_bound, logloss, normalized_entropy, calibration: float, or None where undefined;
            rows, positives: counts of rows of positive weight.

        Raises:
            DataError: some logits or labels were not finite.
        """
        state = self._state.cpu()
        negative, positive = state[: self.bins], state[self.bins : 2 * self.bins]
        loss, prediction, rows, positives, not_finite = state[2 * self.bins :].tolist()
        if not_finite:
            raise DataError(f"metrics: {int(not_finite):,} rows have a logit or label that is not finite")
        positive_weight, negative_weight = float(positive.sum()), float(negative.sum())
        total, pairs = positive_weight + negative_weight, positive_weight * negative_weight
        metrics: dict[str, float | None] = dict.fromkeys(
            ("auc", "auc_error_bound", "logloss", "normalized_entropy", "calibration")
        )
        if total > 0:
            metrics["logloss"] = loss / total
        if positive_weight > 0:
            metrics["calibration"] = prediction / positive_weight
        if pairs > 0:
            beaten = negative.cumsum(0) - 0.5 * negative
            metrics["auc"] = float(positive @ beaten) / pairs
            metrics["auc_error_bound"] = float(positive @ negative) / (2 * pairs)
            metrics["normalized_entropy"] = metrics["logloss"] / entropy(positive_weight, negative_weight)
        return metrics | {"rows": int(rows), "positives": int(positives)}
