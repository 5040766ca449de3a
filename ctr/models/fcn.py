"""FCN, the fusing cross network (Li et al., arXiv 2407.13349, first called DCNv3)."""

from __future__ import annotations

from torch import Tensor

from tessera.ctr.models.ecn import CrossStack, by_head, check_heads, width_of_head
from tessera.ctr.models.layers import FieldEmbedding, label_logits, linear, need_pairs
from tessera.ctr.models.tower import Fields, Tower


class FCN(Tower):
    """z = (z_E + z_S) / 2,  z_E of exponential crosses (deep), z_S of linear ones (shallow), means over heads;
    y = sigmoid(z)

    L = BCE(z) + v_E BCE(z_E) + v_S BCE(z_S),  v_. = max(0, BCE(z_.) - BCE(z)) over the global batch: the part that is
    worse than both together learns by itself, too. v is not detached, as in the authors' code.
    """

    branch_loss = "worse"

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        deep_layers: int,
        shallow_layers: int,
        heads: int,
        deep_dropout: float,
        shallow_dropout: float,
        *,
        layer_norm: bool,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        check_heads(heads)
        self.embedding_dims = {"v": embedding_dim * heads}
        self.heads = heads
        self.embed = FieldEmbedding(fields, embedding_dim * heads)
        need_pairs("FCN", self.embed.count)
        inputs = width_of_head(self.embed, heads)
        self.deep, self.shallow = (
            CrossStack(
                f"model.{key}_layers",
                layers,
                inputs,
                heads,
                dropout,
                layer_norm=layer_norm,
                batch_norm=batch_norm,
                doubles=key == "deep",
                dropout_key=f"model.{key}_dropout",
            )
            for key, layers, dropout in (
                ("deep", deep_layers, deep_dropout),
                ("shallow", shallow_layers, shallow_dropout),
            )
        )
        self.deep_output, self.shallow_output = linear(inputs, 1), linear(inputs, 1)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        first_bhi = by_head(self.embed, numeric_bn, self.embed(numeric_bn, embeddings["v"]), self.heads)
        deep = label_logits(self.deep_output(self.deep(first_bhi)).mean(1))
        shallow = label_logits(self.shallow_output(self.shallow(first_bhi)).mean(1))
        if self.training:
            self.branches = (deep, shallow)
        return (deep + shallow) * 0.5
