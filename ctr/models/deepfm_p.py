"""DeepFM-P (Guo et al., 2018, arXiv 1804.04950): DeepFM whose deep component is a product network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.ctr.models.layers import (
    MLP,
    FactorizationMachine,
    FieldEmbedding,
    FirstOrder,
    InnerProducts,
    label_logits,
    need_pairs,
)
from tessera.ctr.models.tower import Fields, Tower


class DeepFMP(Tower):
    """y = sigmoid(w0 + <w, x> + sum_{i<j} <e_i, e_j> + MLP(concat(e_1, .., e_F, {<e_i, e_j> : i < j})))

    with e_i = v_i x_i. The sum over pairs is the factorization machine; here the pairs are at hand for the MLP.
    """

    has_heads = True

    def __init__(
        self, fields: Fields, embedding_dim: int, hidden: Sequence[int], dropout: float, *, batch_norm: bool
    ) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim, "w": fields.outputs}
        self.first_order = FirstOrder(fields)
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("DeepFMP", self.embed.count)
        self.fm = FactorizationMachine(embedding_dim, fields.outputs)
        self.products = InnerProducts(self.embed.count)
        self.mlp = MLP(
            self.embed.inputs + self.products.count, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs
        )

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        inputs = torch.cat([self.embed.flat(numeric_bn, emb_bfd), self.products(emb_bfd)], 1)
        return self.first_order(numeric_bn, embeddings["w"]) + self.fm(emb_bfd) + label_logits(self.mlp(inputs))
