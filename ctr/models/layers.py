"""Layers that several towers share, under the names the literature gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NumericEmbedding(nn.Module):
    """One learned vector per numeric field, scaled by the field's value: e_i = v_i x_i (DeepFM, AutoInt 4.2)."""

    def __init__(self, fields: int, dim: int, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fields, dim))
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, numeric_bn: Tensor) -> Tensor:
        """[B, n] float32 -> [B, n, dim]."""
        return numeric_bn.unsqueeze(2) * self.weight


class FactorizationMachine(nn.Module):
    """Sum of all pairwise inner products by the identity 1/2 ((sum_i e_i)^2 - sum_i e_i^2), O(F D) (DeepFM eq. 2)."""

    def forward(self, emb_bfd: Tensor) -> Tensor:
        """[B, F, D] -> [B]."""
        square_of_sum = emb_bfd.sum(1).square()
        sum_of_square = emb_bfd.square().sum(1)
        return 0.5 * (square_of_sum - sum_of_square).sum(1)


class MLP(nn.Sequential):
    """Linear, (batch norm), ReLU, dropout per hidden layer, then one linear output of `outputs` units."""

    def __init__(
        self, inputs: int, hidden: Sequence[int], dropout: float = 0.0, batch_norm: bool = False, outputs: int = 1
    ) -> None:
        layers: list[nn.Module] = []
        for width in hidden:
            layers.append(nn.Linear(inputs, width))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
            inputs = width
        layers.append(nn.Linear(inputs, outputs))
        super().__init__(*layers)
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
