"""Wide & Deep (Cheng et al., DLRS 2016, arXiv 1606.07792)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.ctr.models.layers import MLP, FieldEmbedding, FirstOrder, label_logits
from tessera.ctr.models.tower import Fields, Tower


class WideDeep(Tower):
    """y = sigmoid(w0 + <w, x> + MLP(concat_i e_i))   (section 3; hand-crossed features are features of the schema)"""

    has_heads = True

    def __init__(
        self, fields: Fields, embedding_dim: int, hidden: Sequence[int], dropout: float, *, batch_norm: bool
    ) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim, "w": fields.outputs}
        self.wide = FirstOrder(fields)
        self.embed = FieldEmbedding(fields, embedding_dim, side_by_side=True)
        self.mlp = MLP(self.embed.inputs, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        return self.wide(numeric_bn, embeddings["w"]) + label_logits(self.mlp(self.embed.flat(numeric_bn, emb_bfd)))
