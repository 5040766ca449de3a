"""Shared bottom: one net for all labels and a head for each (Caruana, Machine Learning 28, 1997)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tessera.ctr.models.experts import Experts, Heads
from tessera.ctr.models.tower import Fields, Tower


class SharedBottom(Tower):
    """h = bottom(x);  z_t = head_t(h).  The bottom's last layer is linear."""

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        bottom: Sequence[int],
        head: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
        body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.bottom = Experts(fields, embedding_dim, 1, bottom, dropout, batch_norm=batch_norm, body=body)
        self.embedding_dims = self.bottom.embedding_dims
        self.heads = Heads(len(fields.labels), self.bottom.width, head, dropout, batch_norm=batch_norm)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        states_b1w, _ = self.bottom(numeric_bn, embeddings)
        return self.heads([states_b1w.squeeze(1)] * len(self.heads.nets))
