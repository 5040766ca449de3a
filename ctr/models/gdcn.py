"""GDCN, the gated deep and cross network (Wang et al., CIKM 2023, arXiv 2311.04635)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, linear, need_pairs
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

STRUCTURES = ("parallel", "stacked")


class GDCN(Tower):
    """x_{l+1} = x_0 * (W_l x_l + b_l) * sigmoid(G_l x_l) + x_l   (eq. 2): the gate G says which crosses pass

    parallel (GDCN-P): y = sigmoid(w^T [x_L, h(x_0)]);  stacked (GDCN-S): y = sigmoid(w^T h(x_L)).
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        cross_layers: int,
        structure: str,
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        if structure not in STRUCTURES:
            raise ConfigError(f"model.structure is {structure!r}; expected {' or '.join(STRUCTURES)}")
        if cross_layers < 1:
            raise ConfigError(f"model.cross_layers is {cross_layers}; expected at least 1")
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("GDCN", self.embed.count)
        inputs = self.embed.inputs
        self.parallel = structure == "parallel"
        self.cross = nn.ModuleList(GatedCross(inputs) for _ in range(cross_layers))
        self.mlp = MLP(inputs, hidden, dropout, batch_norm=batch_norm, outputs=None)
        self.output = linear(self.mlp.width + (inputs if self.parallel else 0), fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        first = self.embed.flat(numeric_bn, self.embed(numeric_bn, embeddings["v"]))
        crossed = first
        for layer in self.cross:
            crossed = layer(first, crossed) + crossed
        if self.parallel:
            return label_logits(self.output(torch.cat([crossed, self.mlp(first)], 1)))
        return label_logits(self.output(self.mlp(crossed)))


class GatedCross(nn.Module):
    """x_0 * (W x + b) * sigmoid(G x): two tensors [B, inputs] -> [B, inputs]. b begins between 0 and 1, as the authors'
    code has it."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = linear(inputs, inputs)
        self.gate = linear(inputs, inputs, bias=False)
        nn.init.uniform_(self.weight.bias)

    def forward(self, first: Tensor, crossed: Tensor) -> Tensor:
        return first * self.weight(crossed) * torch.sigmoid(self.gate(crossed))
