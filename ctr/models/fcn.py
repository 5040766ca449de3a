"""FCN, the fusing cross network (Li et al., arXiv 2407.13349, first called DCNv3)."""

from __future__ import annotations

from torch import Tensor

from tessera.ctr.models.ecn import CrossStack, FieldsByHead
from tessera.ctr.models.layers import label_logits, linear, need_positive
from tessera.ctr.models.tower import Fields


class FCN(FieldsByHead):
    """z = (z_E + z_S) / 2,  z_E of exponential crosses (deep), z_S of linear ones (shallow), means over heads;
    y = sigmoid(z)

    L = BCE(z) + v_E BCE(z_E) + v_S BCE(z_S),  v_. = max(0, BCE(z_.) - BCE(z)) over the global batch: the part that is
    worse than both together learns by itself, too. v is not detached, as in the authors' code. Of several labels each
    has this loss, with logits of its own over the same crosses.
    """

    has_heads = True
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
        super().__init__(fields, embedding_dim, heads)
        need_positive(deep_layers=deep_layers, shallow_layers=shallow_layers)
        self.deep, self.shallow = (
            CrossStack(
                layers,
                self.inputs,
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
        self.deep_output, self.shallow_output = (linear(self.inputs, fields.outputs) for _ in range(2))

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        first_bhi = self.by_head(numeric_bn, embeddings["v"])
        deep = label_logits(self.deep_output(self.deep(first_bhi)).mean(1))
        shallow = label_logits(self.shallow_output(self.shallow(first_bhi)).mean(1))
        if self.training:
            self.branches = (deep, shallow)
        return (deep + shallow) * 0.5
