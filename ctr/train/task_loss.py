"""The loss of a step: each label's over the rows in which it counts, summed.

    L = sum_t w_t sum_b s_b m_bt loss_t(z_bt, y_bt) / sum_b s_b      s: sample weight, m: the label counts in the row

The divisor is the weight of all rows of the global batch, the same for every label: with one for each label, their
weights against each other would change from batch to batch as conversions come and go. `trainer.loss_divisor: task`
has it so nevertheless.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ctr.data.batch import Batch
from tessera.ctr.data.label_spaces import joint_label, joint_logit, known_in_space
from tessera.ctr.data.labels import Label
from tessera.ctr.models.tower import Tower
from tessera.ctr.train.branch_loss import worse_branches
from tessera.ctr.train.losses import RANKED, loss_of_rows, ranking_loss
from tessera.distributed.collectives import gather, sum_over_ranks


class TaskLoss:
    """The loss of a batch to its labels, as this rank's part of a sum over all ranks.

    Attributes:
        shift: what is added to logits, as batches lack some of the rows with label 0.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        tower: Tower,
        rank: int = 0,
        divisor: str = "batch",
        negative_rate: float = 1.0,
    ) -> None:
        """divisor: batch | task, see `trainer.loss_divisor`. negative_rate: the share of rows with label 0 that are in
        the batches, where odds are higher than those of all rows, by 1 / that (`ctr/data/negatives.py`)."""
        self.shift = -math.log(negative_rate)
        self._labels, self._joint, self._rank = tuple(labels), tower.trains_joint, rank
        self._tower = tower
        self._soft: TaskLoss | None = None
        if tower.branch_loss == "agreement":
            self._soft = soft_loss(labels, tower, rank, divisor)
        self._by_task = divisor == "task"
        of_tower = tower.loss_weights or (1.0,) * len(self._labels)
        self._weights = [label.weight * factor for label, factor in zip(self._labels, of_tower, strict=True)]
        one = len(self._labels) == 1 and self._weights == [1]
        self._plain = one and self._labels[0].is_plain and not self._by_task

    def __call__(self, logits: Tensor, batch: Batch, weight: float | Tensor) -> Tensor:
        """Return the loss of this rank's rows, summed by their weights, and what the tower adds. Collective where
        rows of a group are compared, with divisor task, and where a tower's branches learn by how much they are worse.

        logits: [B], or [B, T]. weight: of the global batch, by which the caller divides; a scalar of the device spares
        the host waiting for it.
        """
        extra, self._tower.extra_loss = self._tower.extra_loss, None
        loss = self._with_branches(logits, batch, weight)
        return loss if extra is None else loss + (batch.weight * extra).sum()

    def _with_branches(self, logits: Tensor, batch: Batch, weight: float | Tensor) -> Tensor:
        branches, self._tower.branches = self._tower.branches, ()
        if not branches:
            return self._summed(logits, batch, weight)
        parts = [branch.float() if branch.dtype == torch.bfloat16 else branch for branch in branches]
        if self._tower.branch_loss == "worse":
            losses = torch.stack([self._by_label(part, batch, weight) for part in (logits, *parts)])
            return worse_branches(losses, self._weights, weight)
        assert self._soft is not None
        loss, soft = self._summed(logits, batch, weight), soft_batch(self._labels, logits, batch)
        return loss + torch.stack([self._soft._summed(part, soft, weight) for part in parts]).sum()

    def _summed(self, logits: Tensor, batch: Batch, weight: float | Tensor) -> Tensor:
        """Return the loss of logits [B] or [B, T] to the labels."""
        if self.shift:
            logits = logits + self.shift
        if self._plain and batch.known is None:
            return F.binary_cross_entropy_with_logits(logits, batch.labels[:, 0], batch.weight, reduction="sum")
        return self._of_labels(logits, batch, weight, self._weights).sum()

    def _by_label(self, logits: Tensor, batch: Batch, weight: float | Tensor) -> Tensor:
        """Return the loss to each label without the label's weight, [T]."""
        if self._plain and batch.known is None:
            return self._summed(logits, batch, weight).unsqueeze(0)
        logits = logits + self.shift if self.shift else logits
        return self._of_labels(logits, batch, weight, [1.0] * len(self._labels))

    def _of_labels(self, logits: Tensor, batch: Batch, weight: float | Tensor, factors: Sequence[float]) -> Tensor:
        logits_bt = logits.unsqueeze(1) if logits.dim() == 1 else logits
        parts = [self._masked(number, logits_bt, batch) for number in range(len(self._labels))]
        losses = torch.stack([factors[number] * self._of(number, *part, batch) for number, part in enumerate(parts)])
        if self._by_task:
            sums = torch.stack([mask_weight.sum() for _, _, mask_weight in parts]).detach()
            sum_over_ranks(sums)
            losses = losses * torch.where(sums > 0, weight / sums, 0.0)
        return losses

    def _masked(self, number: int, logits_bt: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logit, label and weight of a label, [B] each; the weight is 0 where it does not count."""
        if self._joint and self._labels[number].parent is not None:
            value, mask = joint_label(self._labels, number, batch.labels, batch.known)
            logit = joint_logit(self._labels, number, logits_bt)
        else:
            value, logit = batch.labels[:, number], logits_bt[:, number]
            mask = known_in_space(self._labels, number, batch.labels, batch.known)
        return logit, value, batch.weight if mask is None else batch.weight * mask

    def _of(self, number: int, logit: Tensor, value: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        label = self._labels[number]
        loss = (weight * loss_of_rows(label, logit, value)).sum()
        if label.loss not in RANKED:
            return loss
        assert batch.group is not None  # the schema asks for it
        return label.mix * loss + (1 - label.mix) * self._ranked(label, logit, value, weight, batch.group)

    def _ranked(self, label: Label, logit: Tensor, value: Tensor, weight: Tensor, group: Tensor) -> Tensor:
        """Return the ranking loss of this rank's rows, among the rows of all ranks.

        Its value is that of own rows, so that ranks add up to the whole; its gradient is that of the whole, as an own
        logit stands in the losses of other ranks' rows, too. So every rank computes the whole, and none has to wait for
        another in the backward pass.
        """
        rank, rows = self._rank, len(logit)
        everyone = gather(torch.cat([logit.detach(), value, weight])).unflatten(1, (3, rows))
        logits = everyone[:, 0].clone()
        logits[rank] = logit
        groups = gather(group)
        losses = ranking_loss(
            label, logits.flatten(), everyone[:, 1].flatten(), everyone[:, 2].flatten(), groups.flatten()
        )
        total, own = losses.sum(), losses.view(-1, rows)[rank].sum()
        return total + (own - total).detach()


def soft_loss(labels: Sequence[Label], tower: Tower, rank: int, divisor: str) -> TaskLoss:
    """Return the loss to answers in the place of labels, in batches that `soft_batch` makes: squares of numbers, and
    cross-entropy to probabilities, with the weights of the labels."""
    soft = []
    for label in labels:
        loss = "mse" if label.is_number else "cross_entropy"
        soft.append(replace(label, loss=loss, smoothing=0.0, parent=None, nulls="unknown"))
    plain = Tower()
    plain.loss_weights = tower.loss_weights
    return TaskLoss(soft, plain, rank, divisor)


def soft_batch(labels: Sequence[Label], logits: Tensor, batch: Batch) -> Batch:
    """Return the batch with answers in the place of its labels: numbers, or probabilities. They have no gradient, and
    count where the labels do. logits: [B], or [B, T]."""
    logits_bt = logits.detach().unsqueeze(1) if logits.dim() == 1 else logits.detach()
    answers = [logits_bt[:, i] if one.is_number else logits_bt[:, i].sigmoid() for i, one in enumerate(labels)]
    masks = [known_in_space(labels, number, batch.labels, batch.known) for number in range(len(labels))]
    known = None
    if any(mask is not None for mask in masks):
        everywhere = torch.ones_like(batch.weight, dtype=torch.bool)
        known = torch.stack([everywhere if mask is None else mask for mask in masks], 1)
    return replace(batch, labels=torch.stack(answers, 1), known=known)
