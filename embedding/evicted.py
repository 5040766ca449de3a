"""Keep ids whose rows were evicted for readers that must drop them too (a serving copy of the table, a saved delta)."""

from __future__ import annotations

import torch
from torch import Tensor


class EvictedIds:
    """The last `limit` evicted ids or a few more, for each reader since it took them last: whole pieces are dropped.

    Readers do not take ids from each other. None are kept for one before its first `take`, so that they take no memory
    where nobody asks for them.
    """

    def __init__(self, limit: int, device: torch.device | str = "cpu") -> None:
        self._limit = limit
        self._device = device
        self._pieces: dict[str, list[Tensor]] = {}
        self._count: dict[str, int] = {}
        self._incomplete: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of the ids. Readers share the pieces, and the one that took longest ago has them all."""
        return 8 * max(self._count.values(), default=0)

    @property
    def wanted(self) -> bool:
        """Whether somebody asks for them."""
        return bool(self._pieces)

    def add(self, ids: Tensor) -> None:
        for reader in self._pieces if ids.numel() else ():
            self.add_for(reader, ids)

    def add_for(self, reader: str, ids: Tensor) -> None:
        """Keep ids for one reader, which has taken before."""
        pieces = self._pieces[reader]
        pieces.append(ids)
        self._count[reader] += ids.numel()
        while pieces and self._count[reader] - pieces[0].numel() >= self._limit:
            self._count[reader] -= pieces.pop(0).numel()
            self._incomplete.add(reader)

    def complete(self, reader: str) -> bool:
        """Return whether all ids since the reader's last `take` are kept; False if it never took."""
        return reader in self._pieces and reader not in self._incomplete

    def read(self, reader: str) -> Tensor:
        """Return all ids kept for a reader, each once: int64 [k], ascending."""
        none = torch.empty(0, dtype=torch.int64, device=self._device)
        ids: Tensor = torch.cat([none, *self._pieces.get(reader, [])]).unique()
        return ids

    def take(self, reader: str) -> Tensor:
        """Return the same as `read`, and forget these ids."""
        ids = self.read(reader)
        self._pieces[reader], self._count[reader] = [], 0
        self._incomplete.discard(reader)
        return ids
