"""DeepFM (Guo et al., IJCAI 2017, arXiv 1703.04247), the DeepFM-D of the later paper (arXiv 1804.04950)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.ctr.models.layers import MLP, FactorizationMachine, FieldEmbedding, FirstOrder, label_logits, need_pairs
from tessera.ctr.models.tower import Fields, Tower


class DeepFM(Tower):
    """y = sigmoid(w0 + <w, x> + sum_{i<j} <v_i, v_j> x_i x_j + MLP(concat_i v_i x_i))   (section 2.1)

    The factorization machine and the MLP read the same embeddings v. First-order weights w are a second table of
    dim 1 on the same ids.
    """

    has_heads = True

    def __init__(
        self, fields: Fields, embedding_dim: int, hidden: Sequence[int], dropout: float, *, batch_norm: bool
    ) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim, "w": fields.outputs}
        self.first_order = FirstOrder(fields)
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("DeepFM", self.embed.count)
        self.fm = FactorizationMachine(embedding_dim, fields.outputs)
        self.mlp = MLP(self.embed.inputs, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        deep = label_logits(self.mlp(self.embed.flat(numeric_bn, emb_bfd)))
        return self.first_order(numeric_bn, embeddings["w"]) + self.fm(emb_bfd) + deep
