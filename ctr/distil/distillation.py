"""Knowledge distillation of IncCTR (Wang et al., arXiv 2009.02147): learn from a teacher's logits beside the labels.

    L = CE(y, sigmoid(z)) + weight * CE(sigmoid(z / temperature), sigmoid(z_teacher / temperature))

The teacher is the model as it was before the period (KD-self) or another run's model (KD-batch). It scores the rows
once, before training on them begins (`teacher_logits.py`), and only its logits are kept, by the numbers of rows: four
bytes a row of the period instead of a second copy of all tables, and the same logits whatever the ranks, the order of
batches, and however often training is stopped and goes on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ctr.data.batch import Batch
from tessera.ctr.distil.config import DistilConfig
from tessera.ctr.train.state_parts import FoundState, PartState
from tessera.distributed.collectives import sum_over_ranks


class Distillation:
    """The teacher's part of the loss.

    Attributes:
        logits: the teacher's, by row number: float32 [rows] on the host; NaN for a row that it has not scored, which is
            learned from its label alone.
        sums: cross-entropy to the teacher, and sample weight, of this rank's rows of the epoch so far: float64 [2].
        previous: cross-entropy to the teacher in the epoch before, over all ranks, or None.
        falling: whether it fell from one epoch to the next, the last time that it could be known.
    """

    def __init__(self, config: DistilConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.logits: Tensor | None = None
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.previous: float | None = None
        self.falling = True

    def begin_period(self, logits: Tensor) -> None:
        """Set the logits (float32 [rows]) to learn from, from here on."""
        self.logits, self.previous, self.falling = logits, None, True
        self.sums.zero_()

    def loss(self, logits: Tensor, batch: Batch, *, count: bool = True) -> Tensor:
        """Return `weight` times the cross-entropy to the teacher, summed over the rows of a batch by their weights.

        logits: [B]; batch: with numbers of rows. count: add it to the sums of the epoch.
        """
        assert self.logits is not None, "the teacher has not scored the rows of this period"
        assert batch.number is not None, "the reader does not number rows"
        # Padding takes any: its weight is 0.
        teacher = self.logits[batch.number].to(logits.device, non_blocking=True)
        config, known = self.config, ~teacher.isnan()
        soft = torch.sigmoid(torch.where(known, teacher, 0.0) / config.temperature)
        entropy = F.binary_cross_entropy_with_logits(
            logits / config.temperature, soft, batch.weight * known, reduction="sum"
        )
        loss = config.weight * entropy
        if count:
            self.sums += torch.stack([loss.detach().double(), batch.weight.sum().double()])
        return loss

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
