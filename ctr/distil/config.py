"""`trainer.distil` of the configuration: learn from a teacher beside the labels (ctr/distil/distillation.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.embedding.errors import ConfigError


@dataclass
class DistilConfig:
    """`trainer.distil` of the configuration."""

    kind: str = "none"
    teacher: str | None = None
    targets: list[str] = field(default_factory=list)
    temperature: float = 1.0
    weight: float = 1.0
    max_epochs: int | None = None

    def check(self, epochs: int) -> None:
        """Raise ConfigError for values that cannot be. epochs: `trainer.epochs`."""
        if self.kind not in ("none", "self", "batch"):
            raise ConfigError(f"trainer.distil.kind is {self.kind!r}; expected none, self or batch")
        if (self.kind == "batch") != (self.teacher is not None):
            raise ConfigError(
                f"trainer.distil.kind is {self.kind} and trainer.distil.teacher is {self.teacher}; "
                "expected a run folder for batch, and null for the others"
            )
        if not self.temperature > 0:
            raise ConfigError(f"trainer.distil.temperature is {self.temperature}; expected a number above 0")
        if not self.weight >= 0:
            raise ConfigError(f"trainer.distil.weight is {self.weight}; expected 0 or above")
        if self.max_epochs is not None and self.max_epochs < epochs:
            raise ConfigError(
                f"trainer.distil.max_epochs is {self.max_epochs}; expected at least trainer.epochs, {epochs}"
            )
