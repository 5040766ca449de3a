"""DCN, the deep and cross network (Wang et al., ADKDD 2017, arXiv 1708.05123)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, linear, need_pairs, need_positive
from tessera.ctr.models.tower import Fields, Tower


class DCN(Tower):
    """x_{l+1} = x_0 <w_l, x_l> + b_l + x_l   (eq. 3), beside an MLP h:  y = sigmoid(w^T [x_L, h(x_0)])   (eq. 6)

    Without an MLP (`hidden` empty) it is the cross network alone.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        cross_layers: int,
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        need_positive(cross_layers=cross_layers)
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("DCN", self.embed.count)
        inputs = self.embed.inputs
        self.cross = nn.ModuleList(RankOneCross(inputs) for _ in range(cross_layers))
        self.mlp = MLP(inputs, hidden, dropout, batch_norm=batch_norm, outputs=None) if hidden else None
        self.output = linear(inputs + (self.mlp.width if self.mlp is not None else 0), fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        first = self.embed.flat(numeric_bn, self.embed(numeric_bn, embeddings["v"]))
        crossed = first
        for layer in self.cross:
            crossed = layer(first, crossed) + crossed
        last = crossed if self.mlp is None else torch.cat([crossed, self.mlp(first)], 1)
        return label_logits(self.output(last))


class RankOneCross(nn.Module):
    """x_0 <w, x> + b: two tensors [B, inputs] -> [B, inputs]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = linear(inputs, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(inputs))

    def forward(self, first: Tensor, crossed: Tensor) -> Tensor:
        return torch.addcmul(self.bias, first, self.weight(crossed))
