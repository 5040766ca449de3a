"""DCN-V2 (Wang et al., WWW 2021, arXiv 2008.13535)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, linear, need_pairs, need_positive
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

STRUCTURES = ("parallel", "stacked")


class CrossNetwork(Tower):
    """Base of DCN-V2 and GDCN: x_{l+1} = x_0 * f_l(x_l) + x_l, beside a deep network h (parallel) or below it (stacked)

    parallel: y = sigmoid(w^T [x_L, h(x_0)]);  stacked: y = sigmoid(w^T h(x_L))   (DCN-V2, section 3.3)
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        cross_layers: int,
        make_layer: Callable[[int], nn.Module],
        structure: str,
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        """make_layer: the width of x -> an f, [B, width] -> [B, width]."""
        super().__init__()
        if structure not in STRUCTURES:
            raise ConfigError(f"model.structure is {structure!r}; expected {' or '.join(STRUCTURES)}")
        need_positive(cross_layers=cross_layers)
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs(type(self).__name__, self.embed.count)
        inputs = self.embed.inputs
        self.parallel = structure == "parallel"
        self.cross = nn.ModuleList(make_layer(inputs) for _ in range(cross_layers))
        self.mlp = MLP(inputs, hidden, dropout, batch_norm=batch_norm, outputs=None)
        self.output = linear(self.mlp.width + (inputs if self.parallel else 0), fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        first = self.embed.flat(numeric_bn, self.embed(numeric_bn, embeddings["v"]))
        crossed = first
        for layer in self.cross:
            crossed = first * layer(crossed) + crossed
        if self.parallel:
            return label_logits(self.output(torch.cat([crossed, self.mlp(first)], 1)))
        return label_logits(self.output(self.mlp(crossed)))


class DCNV2(CrossNetwork):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l   (eq. 1)"""

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        cross_layers: int,
        low_rank: int | None,
        structure: str,
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        make = partial(_cross, low_rank=low_rank)
        super().__init__(fields, embedding_dim, cross_layers, make, structure, hidden, dropout, batch_norm=batch_norm)


def _cross(inputs: int, low_rank: int | None) -> nn.Module:
    """Return a layer W x + b, or U (V^T x) + b with `low_rank` columns (eq. 2)."""
    if low_rank is None:
        return linear(inputs, inputs)
    if not 1 <= low_rank <= inputs:
        raise ConfigError(f"model.low_rank is {low_rank}; expected null or 1 to {inputs}, the width of all fields")
    return nn.Sequential(linear(inputs, low_rank, bias=False), linear(low_rank, inputs))
