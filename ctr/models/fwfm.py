"""FwFM, the field-weighted factorization machine (Pan et al., WWW 2018, arXiv 1806.03514)."""

from __future__ import annotations

from torch import Tensor

from tessera.ctr.models.layers import FieldEmbedding, FirstOrder, InnerProducts, label_logits, linear, need_pairs
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

LINEAR = ("FiLV", "FeLV", "LW")


class FwFM(Tower):
    """y = sigmoid(w0 + linear + sum_{i<j} r_ij <e_i, e_j>)   (eq. 5): one weight r_ij for each pair of fields

    The linear part (section 3.3): FiLV, sum_i <e_i, u_i> with a vector u_i for each field; FeLV, with one for each
    feature, a second group of vectors; LW, a weight for each feature. Of several labels each has weights of its own.
    """

    has_heads = True

    def __init__(self, fields: Fields, embedding_dim: int, linear_part: str) -> None:
        super().__init__()
        if linear_part not in LINEAR:
            raise ConfigError(f"model.linear_part is {linear_part!r}; expected {', '.join(LINEAR)}")
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("FwFM", self.embed.count)
        self.products = InnerProducts(self.embed.count)
        self.pairs = linear(self.products.count, fields.outputs)
        self.part, self.outputs = linear_part, fields.outputs
        self.embedding_dims = {"v": embedding_dim}
        if linear_part == "FiLV":
            self.of_fields = linear(self.embed.inputs, fields.outputs, bias=False)
        elif linear_part == "FeLV":
            self.embedding_dims["u"] = embedding_dim * fields.outputs
            self.of_features = FieldEmbedding(fields, embedding_dim * fields.outputs)
            self.of_numbers = linear(fields.columns, fields.outputs, bias=False) if self.embed.raw else None
        else:
            self.embedding_dims["w"] = fields.outputs
            self.first_order = FirstOrder(fields)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        crossed = label_logits(self.pairs(self.products(emb_bfd)))
        if self.part == "FiLV":
            return crossed + label_logits(self.of_fields(self.embed.flat(numeric_bn, emb_bfd)))
        if self.part == "LW":
            return crossed + self.first_order(numeric_bn, embeddings["w"])
        u_bfx = self.of_features(numeric_bn, embeddings["u"])
        if self.outputs == 1:
            crossed = crossed + (emb_bfd * u_bfx).sum((1, 2))
        else:
            crossed = crossed + (emb_bfd.unsqueeze(2) * u_bfx.unflatten(2, (self.outputs, -1))).sum((1, 3))
        return crossed if self.of_numbers is None else crossed + label_logits(self.of_numbers(numeric_bn))
