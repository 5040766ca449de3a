"""Factorization machine (Rendle, ICDM 2010)."""

from __future__ import annotations

from torch import Tensor

from tessera.ctr.models.layers import FactorizationMachine, FieldEmbedding, FirstOrder, need_pairs
from tessera.ctr.models.tower import Fields, Tower


class FM(Tower):
    """y = sigmoid(w0 + <w, x> + sum_{i<j} <v_i, v_j> x_i x_j)   (eq. 1)"""

    has_heads = True

    def __init__(self, fields: Fields, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim, "w": fields.outputs}
        self.first_order = FirstOrder(fields)
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("FM", self.embed.count)
        self.fm = FactorizationMachine(embedding_dim, fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        return self.first_order(numeric_bn, embeddings["w"]) + self.fm(emb_bfd)
