"""GDCN, the gated deep and cross network (Wang et al., CIKM 2023, arXiv 2311.04635)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.dcn_v2 import CrossNetwork
from tessera.ctr.models.layers import linear
from tessera.ctr.models.tower import Fields


class GDCN(CrossNetwork):
    """x_{l+1} = x_0 * (W_l x_l + b_l) * sigmoid(G_l x_l) + x_l   (eq. 2): the gate G says which crosses pass

    With structure parallel it is the paper's GDCN-P, stacked GDCN-S.
    """

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
        super().__init__(fields, embedding_dim, cross_layers, Gated, structure, hidden, dropout, batch_norm=batch_norm)


class Gated(nn.Module):
    """(W x + b) * sigmoid(G x): [B, inputs] -> [B, inputs]. b begins between 0 and 1, as the authors' code has it."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = linear(inputs, inputs)
        self.gate = linear(inputs, inputs, bias=False)
        nn.init.uniform_(self.weight.bias)

    def forward(self, rows: Tensor) -> Tensor:
        return self.weight(rows) * torch.sigmoid(self.gate(rows))
