"""What stands in for tables where a model has no id features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from tessera.distributed.plan import TableSize
from tessera.embedding.table import DynamicTable


class NoTables(nn.Module):
    """The methods of `DynamicTables` and `StaticTables` for a model of numeric features alone.

    Args:
        groups: name of a group -> its dim, as the tower wants them.
    """

    tables: Sequence[Any] = ()
    brings_ahead = False
    learns_steps = False

    def __init__(self, groups: dict[str, int]) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Returns group -> [B, 0, dim] float32."""
        empty = torch.empty(ids.stride(), 0, device=ids.values().device)
        return {group: empty.view(len(empty), 0, 1).expand(-1, -1, dim) for group, dim in self.groups.items()}

    def prepare(self, ids: KeyedJaggedTensor, now: int, times: Tensor | None = None) -> None:
        """Nothing to send."""

    def send_prepared(self) -> None:
        """Nothing to send."""

    def squares_looked_up(self, embeddings: dict[str, Tensor]) -> float:
        """No row is looked up."""
        return 0.0

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """None."""
        return {}

    def sharders(self) -> list:
        """None: nothing is sharded."""
        return []

    def sizes(self) -> list[TableSize]:
        """No table takes anything."""
        return []

    def fill(self) -> None:
        """No first rows."""

    def begin_step(self, now: int, learn_steps: bool = False, times: Tensor | None = None) -> None:
        """No rows to touch."""

    def begin_period(self) -> None:
        """No rows to become old."""

    def expire(self, now: int, everywhere: bool = False) -> None:
        """No rows to expire."""

    def stats(self) -> dict[str, dict[str, float]]:
        """Nothing to count."""
        return {}

    def cache_stats(self) -> None:
        """No cache."""

    def owned(self) -> dict[str, DynamicTable]:
        """No dynamic tables."""
        return {}

    def tensors(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def restart(self) -> None:
        """Be as before the first step."""

    def clear(self) -> None:
        """Nothing to forget."""
