"""`trainer.distil` of the configuration: learn from a teacher beside the labels (ctr/distil/distillation.py)."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.embedding.errors import ConfigError
from tessera.embedding.settings import setting


@dataclass
class DistilConfig:
    """`trainer.distil` of the configuration."""

    kind: str = setting(
        "none",
        "none | self: the model as it was when the run began | batch: another run's model",
        choices=("none", "self", "batch"),
    )
    teacher: str | None = setting(None, "batch: the run folder of the teacher")
    targets: list[str] = setting(
        [], "classes outside of ctr.models, not this run's own, that the teacher's config.yaml may name"
    )
    temperature: float = setting(1.0, "divides the logits of both", above=0)
    weight: float = setting(1.0, "of the cross-entropy to the teacher, beside that to the labels", at_least=0)
    max_epochs: int | None = setting(
        None,
        "go on beyond trainer.epochs, up to this, while that cross-entropy falls; null: do not",
        at_least=1,
    )

    def check(self, epochs: int) -> None:
        """Raise ConfigError for keys that contradict each other. epochs: `trainer.epochs`."""
        if (self.kind == "batch") != (self.teacher is not None):
            raise ConfigError(
                f"trainer.distil.kind is {self.kind} and trainer.distil.teacher is {self.teacher}; "
                "expected a run folder for batch, and null for the others"
            )
        if self.max_epochs is not None and self.max_epochs < epochs:
            raise ConfigError(
                f"trainer.distil.max_epochs is {self.max_epochs}; expected at least trainer.epochs, {epochs}"
            )
