"""Keep the numbers of rows that are free again, and give them out, the last freed first."""

from __future__ import annotations

import torch
from torch import Tensor


class FreeRows:
    """A stack of row numbers in memory that grows by doubling. `rows` are those on it: int64 [k]."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._stack = torch.empty(0, dtype=torch.int64, device=device)  # the first `_count` count
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        return self._stack[: self._count]

    @property
    def nbytes(self) -> int:
        return self._stack.numel() * 8

    def replace(self, rows: Tensor) -> None:
        """Take over a stack: rows int64 [k], which are copied."""
        self._stack = rows.to(self._stack.device, copy=True)
        self._count = rows.numel()

    def take(self, wanted: int) -> Tensor:
        """Return at most `wanted` rows, the last one first: int64 [k]."""
        taken = min(wanted, self._count)
        self._count -= taken
        return self._stack[self._count : self._count + taken].flip(0)

    def untake(self, count: int) -> None:
        """Undo `take`s since there were `count` rows, if none was given back meanwhile."""
        assert self._count <= count <= self._stack.numel(), (self._count, count)
        self._count = count

    def give_back(self, rows: Tensor) -> None:
        """Put rows (int64 [n]) on the stack."""
        count = self._count + rows.numel()
        if count > self._stack.numel():
            grown = self._stack.new_empty(max(count, 2 * self._stack.numel()))
            grown[: self._count] = self.rows
            self._stack = grown
        self._stack[self._count : count] = rows
        self._count = count
