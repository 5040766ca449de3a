"""AFN and AFN+, the adaptive factorization network (Cheng et al., AAAI 2020, arXiv 1909.03276)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, linear, need_pairs, need_positive
from tessera.ctr.models.tower import Fields, Tower

SMALLEST = 1e-5  # of an absolute value before its logarithm; the paper has 1e-7, public code found this better


class AFN(Tower):
    """y_k = exp(sum_i a_ik ln |e_i|) = prod_i |e_i|^a_ik: K products of learned orders;  y = sigmoid(MLP(y_1 .. y_K))

    Logarithms and products are batch-normalised by field and by product (section 3.3). AFN+ adds an MLP on vectors of
    its own ("deep"), `deep_hidden` not empty; one linear layer joins both logits   (section 3.4)
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        products: int,
        hidden: Sequence[int],
        deep_hidden: Sequence[int],
        dropout: float,
        deep_dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        need_positive(products=products)
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("AFN", self.embed.count)
        self.log_norm, self.exp_norm = BatchNorm(self.embed.count), BatchNorm(products)
        self.orders = linear(self.embed.count, products, bias=False)
        raw = self.embed.inputs - self.embed.count * embedding_dim
        self.mlp = MLP(products * embedding_dim + raw, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)
        self.is_plus = bool(deep_hidden)
        if self.is_plus:
            self.embedding_dims["deep"] = embedding_dim
            self.deep_embed = FieldEmbedding(fields, embedding_dim)
            self.deep = MLP(self.embed.inputs, deep_hidden, deep_dropout, batch_norm=batch_norm, outputs=fields.outputs)
            self.join = linear(2, 1)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        log_bfd = self.log_norm(emb_bfd.abs().clamp(min=SMALLEST).log())
        product_bkd = self.exp_norm(self.orders(log_bfd.transpose(1, 2)).exp().transpose(1, 2))
        logit = self.mlp(self.embed.flat(numeric_bn, product_bkd))
        if not self.is_plus:
            return label_logits(logit)
        deep = self.deep(self.deep_embed.flat(numeric_bn, self.deep_embed(numeric_bn, embeddings["deep"])))
        return label_logits(self.join(torch.stack([logit, deep], 2)).squeeze(2))
