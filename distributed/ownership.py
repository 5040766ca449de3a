"""Map ids to the ranks that own them."""

from __future__ import annotations

import torch
from torch import Tensor


def owner_of(mixed: Tensor, world_size: int) -> Tensor:
    """Return the rank that owns each id: its 64 mixed bits, read as an unsigned number, modulo the number of ranks.

    mixed: int64 [n], `mix64` of raw ids. torchrec's input dist computes the same on what is sent through it.
    """
    if world_size & (world_size - 1) == 0:
        return mixed & (world_size - 1)
    # 2^64 = 2 * 2^63, so for a negative number the unsigned value is (x + 2^63) + 2^63.
    half = 2**63 % world_size
    low = torch.remainder(mixed & (2**63 - 1), world_size)
    return torch.where(mixed < 0, torch.remainder(low + half, world_size), low)
