"""Decay of rows that are served: values lie in files as they were written last, and are decayed where they are read.

A row notes the sum of log(1 - rate decay) over the steps of training that its values have seen and, where decay depends
on counts, an exponent. So rows that no publication brings anew decay with each one all the same, and files of an export
are the same bytes whether it was made anew or brought up to date.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Decay(NamedTuple):
    """How rows of a table decay. floats: that each row notes, 0 where they do not; decayed: what the sum of
    log(1 - rate decay) over the steps of training is at the moment that was saved."""

    floats: int = 0
    decayed: float = 0.0


def kept(noted: np.ndarray, decayed: float) -> Tensor:
    """Return how much of their values rows keep, float32 [n]. noted: float64 [n, 1 or 2]; NaN: no step has seen the
    row."""
    then = torch.from_numpy(np.array(noted[:, 0]))
    since = (decayed - then).nan_to_num(0.0)
    return (since if noted.shape[1] == 1 else since * torch.from_numpy(np.array(noted[:, 1]))).exp().float()
