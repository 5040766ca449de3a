"""Implement `Tables` for a model without id features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from tessera.distributed.plan import TableSize


class NoTables(nn.Module):
    """Implementation of `Tables` for a model of numeric features alone.

    Args:
        groups: name of a group -> its dim, as the tower wants them.
    """

    def __init__(self, groups: dict[str, int]) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return group -> [B, 0, dim] float32."""
        empty = torch.empty(ids.stride(), 0, device=ids.values().device)
        return {group: empty.view(len(empty), 0, 1).expand(-1, -1, dim) for group, dim in self.groups.items()}

    def squares_looked_up(self, embeddings: dict[str, Tensor]) -> Tensor:
        """Return 0: no row is looked up."""
        return torch.zeros(())

    def sizes(self) -> list[TableSize]:
        """Return nothing: there is no table."""
        return []

    def tensors(self) -> dict[str, Any]:
        """Return nothing: there is no table."""
        return {}
