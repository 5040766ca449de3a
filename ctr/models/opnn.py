"""OPNN, the outer-product network (Qu et al., ICDM 2016, arXiv 1611.00144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, need_pairs
from tessera.ctr.models.tower import Fields, Tower


class OPNN(Tower):
    """y = sigmoid(MLP(concat(e_1, .., e_F, f f^T)))  with f = sum_i e_i   (section III-C, superposition)

    f f^T is the sum of the outer products of all pairs. A kernel of its own per pair instead of the sum is KPNN.
    """

    has_heads = True

    def __init__(
        self, fields: Fields, embedding_dim: int, hidden: Sequence[int], dropout: float, *, batch_norm: bool
    ) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("OPNN", self.embed.count)
        self.mlp = MLP(
            self.embed.inputs + embedding_dim**2, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs
        )

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        sum_bd = emb_bfd.sum(1)
        outer_bdd = sum_bd.unsqueeze(2) * sum_bd.unsqueeze(1)
        return label_logits(self.mlp(torch.cat([self.embed.flat(numeric_bn, emb_bfd), outer_bdd.flatten(1)], 1)))
