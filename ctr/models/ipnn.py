"""IPNN, the inner-product network (Qu et al., ICDM 2016, arXiv 1611.00144; TOIS 2018, arXiv 1807.00311)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.ctr.models.layers import MLP, FieldEmbedding, InnerProducts, label_logits, need_pairs
from tessera.ctr.models.tower import Fields, Tower


class IPNN(Tower):
    """y = sigmoid(MLP(concat(e_1, .., e_F, {<e_i, e_j> : i < j})))

    The form of the later paper and of the authors' code, without the first one's low-rank approximation.
    """

    has_heads = True

    def __init__(
        self, fields: Fields, embedding_dim: int, hidden: Sequence[int], dropout: float, *, batch_norm: bool
    ) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("IPNN", self.embed.count)
        self.products = InnerProducts(self.embed.count)
        self.mlp = MLP(
            self.embed.inputs + self.products.count, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs
        )

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        return label_logits(self.mlp(torch.cat([self.embed.flat(numeric_bn, emb_bfd), self.products(emb_bfd)], 1)))
