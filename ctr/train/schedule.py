"""Say how a learning rate falls over the steps of training."""

from __future__ import annotations

import math

from tessera.ctr.config_types import ScheduleConfig


def share_of_rate(schedule: ScheduleConfig, steps: int) -> float:
    """Return what a schedule leaves of a learning rate, from `schedule.floor` to 1.

    steps: done since warm-up ended. With s of them and S = `schedule.steps`: cosine (arXiv 1608.03983, section 3,
    without restarts) floor + (1 - floor) (1 + cos(pi min(1, s / S))) / 2; step: factor to the power of s / S rounded
    down; exponential: the same, not rounded.
    """
    if schedule.kind == "constant":
        return 1.0
    assert schedule.steps is not None  # ctr/config_checks.py
    passed = steps / schedule.steps
    if schedule.kind == "cosine":
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * min(1.0, passed))) / 2
    power = steps // schedule.steps if schedule.kind == "step" else passed
    return max(schedule.floor, schedule.factor**power)
