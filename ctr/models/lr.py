"""Logistic regression."""

from __future__ import annotations

from torch import Tensor

from tessera.ctr.models.layers import FirstOrder
from tessera.ctr.models.tower import Fields, Tower


class LR(Tower):
    """y = sigmoid(w0 + <w, x>)"""

    has_heads = True

    def __init__(self, fields: Fields) -> None:
        super().__init__()
        self.embedding_dims = {"w": fields.outputs}
        self.first_order = FirstOrder(fields)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        return self.first_order(numeric_bn, embeddings["w"])
