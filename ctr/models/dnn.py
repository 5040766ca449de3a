"""Embeddings and an MLP: FNN (Zhang et al., ECIR 2016, arXiv 1601.02376) without its pre-training by an FM."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits
from tessera.ctr.models.tower import Fields, Tower


class DNN(Tower):
    """y = sigmoid(MLP(concat_i e_i))"""

    has_heads = True

    def __init__(
        self, fields: Fields, embedding_dim: int, hidden: Sequence[int], dropout: float, *, batch_norm: bool
    ) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim, side_by_side=True)
        self.mlp = MLP(self.embed.inputs, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        return label_logits(self.mlp(self.embed.flat(numeric_bn, emb_bfd)))
