"""Hold the progress of training: plain numbers, the same on all ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tessera.ctr.train.state_parts import FoundState, PartState


@dataclass
class Progress:
    """
    Attributes:
        step, epoch: how many are done; the epoch that is being read has this number.
        now: the clock of the tables, in seconds, 0 before the first step of an epoch (ctr/train/clock.py).
        best: the watched metric of the best evaluation so far.
        evaluations_since_best: how many have followed it.
        evaluated_step: step of the newest evaluation; -1 before the first one.
    """

    step: int = 0
    epoch: int = 0
    now: int = 0
    best: float | None = None
    evaluations_since_best: int = 0
    evaluated_step: int = -1

    def state(self) -> PartState:
        return PartState({"progress": asdict(self)})

    def load(self, found: FoundState) -> None:
        for name in asdict(self):
            setattr(self, name, found.training["progress"][name])
