"""ECN, the exponential cross network of FCN (Li et al., arXiv 2407.13349, first called DCNv3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.dropout import Dropout
from tessera.ctr.models.layers import FieldEmbedding, label_logits, linear, need_pairs, need_positive
from tessera.ctr.models.tower import Fields, Tower


class FieldsByHead(Tower):
    """Base of ECN and FCN, whose heads cross a part of each field's vector. Attributes: inputs: the width of a head."""

    def __init__(self, fields: Fields, embedding_dim: int, heads: int) -> None:
        super().__init__()
        need_positive(heads=heads)
        self.embedding_dims = {"v": embedding_dim * heads}
        self.heads = heads
        self.embed = FieldEmbedding(fields, embedding_dim * heads)
        need_pairs(type(self).__name__, self.embed.count)
        vectors = self.embed.count * self.embed.dim
        self.inputs = vectors // heads + self.embed.inputs - vectors

    def by_head(self, numeric_bn: Tensor, emb_bfd: Tensor) -> Tensor:
        """Return what each head crosses, [B, heads, inputs]: its part of each field's vector, the first halves of all
        fields before all second ones; raw numbers behind them."""
        emb_bfd = self.embed(numeric_bn, emb_bfd)
        parts_bhfd = emb_bfd.unflatten(2, (self.heads, -1)).transpose(1, 2)
        halves = [half.flatten(2) for half in parts_bhfd.tensor_split(2, dim=3)]
        if self.embed.raw:
            halves.append(numeric_bn.to(emb_bfd.dtype).unsqueeze(1).expand(-1, self.heads, -1))
        return torch.cat(halves, 2)


class ECN(FieldsByHead):
    """x_{l+1} = x_l * (c_l + b_l) + x_l: the order of crosses doubles with each layer;  y = sigmoid(mean over heads of
    w^T x_L)

    c_l is `MaskedCross`'s, x_1 the fields' vectors as `by_head` lays them. No MLP.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        layers: int,
        heads: int,
        dropout: float,
        *,
        layer_norm: bool,
        batch_norm: bool,
    ) -> None:
        super().__init__(fields, embedding_dim, heads)
        need_positive(layers=layers)
        self.cross = CrossStack(
            layers,
            self.inputs,
            heads,
            dropout,
            layer_norm=layer_norm,
            batch_norm=batch_norm,
            doubles=True,
        )
        self.output = linear(self.inputs, fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        first_bhi = self.by_head(numeric_bn, embeddings["v"])
        return label_logits(self.output(self.cross(first_bhi)).mean(1))


class CrossStack(nn.Module):
    """Layers x_{l+1} = a * (c_l + b_l) + x_l, c_l of x_l, [B, heads, inputs] -> the same; dropout behind each.

    a is x_l where the order `doubles` with each layer (ECN), x_1 where it grows by one (LCN, the linear one).
    """

    def __init__(
        self,
        layers: int,
        inputs: int,
        heads: int,
        dropout: float,
        *,
        layer_norm: bool,
        batch_norm: bool,
        doubles: bool,
        dropout_key: str = "model.dropout",
    ) -> None:
        super().__init__()
        self.doubles = doubles
        self.layers = nn.ModuleList(
            MaskedCross(inputs, heads, layer_norm=layer_norm, batch_norm=batch_norm) for _ in range(layers)
        )
        self.dropout = nn.ModuleList(Dropout(dropout, dropout_key) for _ in range(layers))

    def forward(self, first_bhi: Tensor) -> Tensor:
        state = first_bhi
        for layer, dropout in zip(self.layers, self.dropout, strict=True):
            state = dropout(torch.addcmul(state, state if self.doubles else first_bhi, layer(state)))
        return state


class MaskedCross(nn.Module):
    """c + b with c = [h; h * ReLU(LN(h))], h = W x half as wide as x: [B, heads, inputs] -> the same.

    W is one for all heads. Batch norm, by head, comes before the layer norm. b begins between 0 and 1. Of an odd width,
    which raw numbers may give, the second half is one shorter.
    """

    def __init__(self, inputs: int, heads: int, *, layer_norm: bool, batch_norm: bool) -> None:
        super().__init__()
        half = -(-inputs // 2)
        self.inputs = inputs
        self.weight = linear(inputs, half, bias=False)
        self.bias = nn.Parameter(torch.empty(inputs))
        nn.init.uniform_(self.bias)
        self.batch_norm = BatchNorm(heads) if batch_norm else nn.Identity()
        self.layer_norm = nn.LayerNorm(half) if layer_norm else nn.Identity()

    def forward(self, state_bhi: Tensor) -> Tensor:
        half = self.batch_norm(self.weight(state_bhi))
        masked = half * self.layer_norm(half).relu()
        return torch.cat([half, masked], 2)[:, :, : self.inputs] + self.bias
