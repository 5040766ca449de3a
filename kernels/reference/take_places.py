"""Assign places in order of arrival, in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def take_places(places: Tensor, rows: Tensor, taken: int) -> Tensor:
    last = places.numel() - 1
    found = rows[places[torch.where(rows < 0, last, rows.clamp(max=last))] == 0]
    places[found] = torch.arange(taken + 1, taken + 1 + found.numel(), dtype=torch.int32, device=places.device)
    return found
