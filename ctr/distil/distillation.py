"""Knowledge distillation of IncCTR (Wang et al., arXiv 2009.02147): learn from a teacher's logits beside the labels.

    L = CE(y, sigmoid(z)) + weight * CE(sigmoid(z / temperature), sigmoid(z_teacher / temperature))

Of several labels each has its term, by its weight and in the rows in which it counts, as its own loss; that of a label
that is a number is (z - z_teacher)^2.

The teacher is the model as it was before the period (KD-self) or another run's model (KD-batch). It scores the rows
once, before training on them begins (`teacher_logits.py`), and only its logits are kept, by the numbers of rows: four
bytes a row of the period instead of a second copy of all tables, and the same logits whatever the ranks, the order of
batches, and however often training is stopped and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ctr.data.batch import Batch
from tessera.ctr.data.labels import Label
from tessera.ctr.distil.config import DistilConfig
from tessera.ctr.train.state_parts import FoundState, PartState
from tessera.ctr.train.task_loss import TaskLoss, soft_batch
from tessera.distributed.collectives import sum_over_ranks


class Distillation:
    """The teacher's part of the loss.

    Attributes:
        logits: the teacher's, by row number: float32 [rows], or [rows, T] of several labels, on the host; NaN for a row
            that it has not scored, which is learned from its labels alone.
        sums: cross-entropy to the teacher, and sample weight, of this rank's rows of the epoch so far: float64 [2].
        previous: cross-entropy to the teacher in the epoch before, over all ranks, or None.
        falling: whether it fell from one epoch to the next, the last time that it could be known.
    """

    def __init__(
        self,
        config: DistilConfig,
        device: torch.device | str = "cpu",
        labels: Sequence[Label] = (),
        soft: TaskLoss | None = None,
    ) -> None:
        """labels: several, one that is a number, or one that rows may lack; with `soft`, the loss to answers in their
        place (`soft_loss`)."""
        self.config = config
        self._labels, self._soft = tuple(labels), soft
        self.logits: Tensor | None = None
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.previous: float | None = None
        self.falling = True

    def begin_period(self, logits: Tensor) -> None:
        """Set the logits (float32, [rows] or [rows, T]) to learn from, from here on."""
        self.logits, self.previous, self.falling = logits, None, True
        self.sums.zero_()

    def loss(self, logits: Tensor, batch: Batch, weight: float = 1.0, *, count: bool = True) -> Tensor:
        """Return `weight` of the configuration times the cross-entropy to the teacher, summed over the rows of a batch
        by their weights. Collective with several labels and `trainer.loss_divisor: task`.

        logits: [B], or [B, T]; batch: with numbers of rows; weight: of the global batch. count: add it to the sums of
        the epoch.
        """
        assert self.logits is not None, "the teacher has not scored the rows of this period"
        assert batch.number is not None, "the reader does not number rows"
        # Padding takes any: its weight is 0.
        teacher = self.logits[batch.number].to(logits.device, non_blocking=True)
        if self._soft is not None:
            entropy = self._of_labels(self._soft, logits, teacher, batch, weight)
        else:
            entropy = self._of_rows(logits, teacher, batch)
        loss = self.config.weight * entropy
        if count:
            self.sums += torch.stack([loss.detach().double(), batch.weight.sum().double()])
        return loss

    def _of_rows(self, logits: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        config, known = self.config, ~teacher.isnan()
        soft = torch.sigmoid(torch.where(known, teacher, 0.0) / config.temperature)
        return F.binary_cross_entropy_with_logits(
            logits / config.temperature, soft, batch.weight * known, reduction="sum"
        )

    def _of_labels(self, soft: TaskLoss, logits: Tensor, teacher: Tensor, batch: Batch, weight: float) -> Tensor:
        logits_bt, teacher_bt = (one.unsqueeze(1) if one.dim() == 1 else one for one in (logits, teacher))
        warmth = [1.0 if label.is_number else self.config.temperature for label in self._labels]
        divisor = torch.tensor(warmth, device=logits.device, dtype=logits.dtype)
        known = ~teacher_bt.isnan()
        answers = soft_batch(self._labels, torch.where(known, teacher_bt, 0.0) / divisor, batch)
        if answers.known is not None:
            known = known & answers.known
        return soft(logits_bt / divisor, replace(answers, known=known), weight)

    def end_epoch(self) -> float | None:
        """Return the epoch's loss per row over all ranks, None without rows; and note whether it is less than that
        before."""
        total = self.sums.clone()
        sum_over_ranks(total)
        loss, weight = total.tolist()
        self.sums.zero_()
        value = loss / weight if weight else None
        self.falling = self.previous is None or (value is not None and value < self.previous)
        self.previous = value
        return value

    def wants_more(self, epoch: int) -> bool:
        """Return whether to train one more epoch after `epoch` of them, because the loss to the teacher still falls."""
        return self.config.max_epochs is not None and epoch < self.config.max_epochs and self.falling

    def state(self) -> PartState:
        state = {"previous": self.previous, "falling": self.falling}
        return PartState({"distil": state}, rank_tensors={"distil_sums": self.sums})

    def load(self, found: FoundState) -> None:
        """Take over all but the logits; nothing from a state of a run that did not distil."""
        found.take_sums("distil_sums", self.sums)
        if state := found.training["distil"]:
            self.previous, self.falling = state["previous"], state["falling"]
