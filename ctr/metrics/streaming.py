"""Compute metrics of a stream of batches on any number of ranks, in memory that does not grow with the rows."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tessera.ctr.data.errors import DataError
from tessera.ctr.metrics.score_table import PROBABILITY_EPSILON, entropy
from tessera.distributed.collectives import min_over_ranks, ranks, sum_over_ranks

BINS = 1 << 16
# The logit at which the offline logloss clips probabilities: 16.1 to either side.
LOGIT_CLIP = math.log((1 - PROBABILITY_EPSILON) / PROBABILITY_EPSILON)
# Keys of logits lie strictly between these two, which stand for "no row yet".
NO_LOWEST, NO_HIGHEST = 1 << 62, -(1 << 62)
SUMS = 5


class StreamingMetrics:
    """AUC from a histogram of logits; logloss, normalized entropy and calibration from exact float64 sums.

    The histogram spans whatever logits came so far, and no more. Its bins are runs of 2^k neighbouring keys
    (`logit_keys`) that begin at multiples of 2^k, with the smallest k for which `bins` of them reach from the lowest
    to the highest logit. When a row falls outside, k grows and bins are added up in pairs, so that the histogram of
    all rows depends on the rows alone, not on their order or on how they are spread over ranks.

    Inside a bin a positive is taken to beat half of the negatives, so AUC is off by at most half of the pairs that
    share a bin: `auc_error_bound` = sum_i P_i N_i / (2 P N).
    `update` never waits for the device; `compute` waits once.
    """

    def __init__(self, bins: int = BINS, device: torch.device | str | None = None) -> None:
        assert bins > 0
        self.bins = bins
        # Lowest and (negated) highest key: both only ever shrink, and ranks agree on them by one minimum.
        self._ends = torch.tensor([NO_LOWEST, -NO_HIGHEST], dtype=torch.int64, device=device)
        # Negatives per bin, positives per bin, then loss, prediction, rows, positives, rows that are not finite: one
        # vector of sums, which ranks merge by one all_reduce.
        self._state = torch.zeros(2 * bins + SUMS, dtype=torch.float64, device=device)
        self._reduced = False

    def to(self, device: torch.device | str) -> StreamingMetrics:
        self._state, self._ends = self._state.to(device), self._ends.to(device)
        return self

    def reset(self) -> None:
        self._state.zero_()
        self._ends.copy_(torch.tensor([NO_LOWEST, -NO_HIGHEST]))
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
        if not logit.numel():
            return
        logit, label = logit.reshape(-1).double(), label.reshape(-1).double()
        weight = torch.ones_like(logit) if weight is None else weight.reshape(-1).double()
        counted = weight > 0
        # A NaN must not reach the sums (0 * NaN is NaN) or, through a cast, a bin number: it is counted.
        finite = torch.isfinite(logit) & torch.isfinite(label)
        usable = counted & finite
        logit, label, weight = (torch.where(usable, values, 0.0) for values in (logit, label, weight))
        keys = logit_keys(logit)
        lowest = torch.where(usable, keys, NO_LOWEST).amin()
        highest = torch.where(usable, keys, NO_HIGHEST).amax()
        self._span(torch.minimum(self._ends, torch.stack([lowest, -highest])))
        self._state.index_add_(0, self._bin_of(keys) + self.bins * (label > 0.5), weight)
        clipped = logit.clamp(-LOGIT_CLIP, LOGIT_CLIP)
        loss = F.softplus(clipped) - label * clipped
        sums = (weight * loss, weight * torch.sigmoid(logit), usable, usable * label, counted & ~finite)
        self._state[2 * self.bins :] += torch.stack([values.double().sum() for values in sums])

    def _span(self, ends: Tensor) -> None:
        """Set ends that contain the earlier ones, and move the counts to the bins they give."""
        kept = self._first_key_of_bins()
        self._ends = ends
        self._move_counts(kept)

    def _width(self) -> Tensor:
        """Return k of the bins' width 2^k, int64 [1]: the smallest for which the bins reach from the lowest to the
        highest."""
        powers = torch.arange(63, device=self._ends.device)
        return ((-self._ends[1] >> powers) - (self._ends[0] >> powers) >= self.bins).sum(dim=0, keepdim=True)

    def _bin_of(self, keys: Tensor) -> Tensor:
        """Return the bin of each key; the clamp takes rows that do not count, and both signs if there is one bin."""
        width = self._width()
        return ((keys >> width) - (self._ends[0] >> width)).clamp(0, self.bins - 1)

    def _first_key_of_bins(self) -> Tensor:
        """Return the lowest key of each bin, int64 [bins]. Bins behind the last one in use hold nothing and end
        early."""
        width = self._width()
        numbers = (self._ends[0] >> width) + torch.arange(self.bins, device=width.device)
        return torch.minimum(numbers, -self._ends[1] >> width) << width

    def _move_counts(self, first_keys: Tensor) -> None:
        """Move the counts of bins that began at these keys into the current bins."""
        target = self._bin_of(first_keys)
        counts = self._state[: 2 * self.bins]
        moved = torch.zeros_like(counts).index_add_(0, torch.cat([target, target + self.bins]), counts)
        counts.copy_(moved)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the other ranks' rows, in two collectives; without a process group there are none."""
        assert not self._reduced, "a second all_reduce would count rows twice; call reset first"
        if ranks(group) > 1:
            ends = self._ends.clone()
            min_over_ranks(ends, group=group)
            self._span(ends)
            sum_over_ranks(self._state, group=group)
        self._reduced = True

    def compute(self) -> dict[str, float | None]:
        """Return the metrics of all rows so far.

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
            metrics["normalized_entropy"] = loss / total / entropy(positive_weight, negative_weight)
        return metrics | {"rows": int(rows), "positives": int(positives)}


def rows_of(metrics: Mapping[str, float | None]) -> int:
    """Return the number of rows that `compute` has seen: the one metric, with `positives`, that is always defined."""
    rows = metrics["rows"]
    assert rows is not None
    return int(rows)


def logit_keys(logit: Tensor) -> Tensor:
    """Map logits (float64, finite) to integers in the same order, int64 below 2^62 in size: the bit pattern of |logit|
    + 1, counted from that of 1, with the logit's sign.

    Equal steps between keys are about equal steps between logits around 0 and equal ratios far from it, so that a few
    huge logits do not take all bins, and near each other a million keys fit between any two float32 numbers.
    """
    magnitude = (logit.abs() + 1.0).view(torch.int64) - _BITS_OF_ONE
    return torch.where(logit < 0, -magnitude, magnitude)


_BITS_OF_ONE = struct.unpack("<q", struct.pack("<d", 1.0))[0]
