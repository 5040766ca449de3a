"""Ids whose rows were given up, kept for whoever must drop them too (a serving copy of the table)."""

from __future__ import annotations

import torch
from torch import Tensor


class EvictedIds:
    """Keeps the last `limit` ids or a few more: whole pieces are dropped. None are kept before the first `take`, so
    that they take no memory where nobody asks for them."""

    def __init__(self, limit: int, device: torch.device | str = "cpu") -> None:
        self._limit = limit
        self._device = device
        self._pieces: list[Tensor] = []
        self._count = 0
        self._asked_for = False

    @property
    def nbytes(self) -> int:
        return self._count * 8

    def add(self, ids: Tensor) -> None:
        if self._limit == 0 or not self._asked_for:
            return
        self._pieces.append(ids)
        self._count += ids.numel()
        while self._count - self._pieces[0].numel() >= self._limit:
            self._count -= self._pieces.pop(0).numel()

    def take(self) -> Tensor:
        """All ids kept, each once: int64 [k], ascending; then forget them."""
        self._asked_for = True
        pieces = self._pieces or [torch.empty(0, dtype=torch.int64, device=self._device)]
        self._pieces, self._count = [], 0
        return torch.cat(pieces).unique()
