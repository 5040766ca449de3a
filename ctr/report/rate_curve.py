"""Say how a loss depends on a learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RateCurve:
    """One side. rate, loss, still: float64 [steps]; still: the loss where the rate is next to 0. smooth: loss - still,
    smoothed. suggested: where that falls most steeply over the logarithm of the rate, None where it does not fall.
    least: the rate of the least one, from which on rates are too high. ended: why there are fewer steps."""

    side: str
    key: str
    configured: float
    rate: np.ndarray
    loss: np.ndarray
    still: np.ndarray
    smooth: np.ndarray
    suggested: float | None
    least: float
    ended: str = ""
