"""Say what came out of one trial of a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrialResult:
    """One trial. value: best of its evaluations, None without one. state: complete | pruned | failed."""

    number: int
    state: str
    value: float | None
    values: dict[str, Any]
    evaluations: list[float] = field(default_factory=list)
    seconds: float | None = None
    why: str = ""
