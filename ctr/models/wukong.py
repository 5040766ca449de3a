"""Wukong (Zhang et al., ICML 2024, arXiv 2403.02545)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, linear, need_pairs, need_positive
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError


class Wukong(Tower):
    """X_{l+1} = LN([FMB(X_l), LCB(X_l)] + X_l)   (eqs. 1 to 4),  y = sigmoid(MLP(concat X_L)): a stack in which the
    order of interactions doubles with each layer. X_0 are the fields' vectors.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        layers: int,
        fm_vectors: int,
        linear_vectors: int,
        rank: int,
        fm_hidden: Sequence[int],
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        need_positive(layers=layers, fm_vectors=fm_vectors, rank=rank)
        if linear_vectors < 0:
            raise ConfigError(f"model.linear_vectors is {linear_vectors}; expected at least 0")
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("Wukong", self.embed.count)
        counts = [self.embed.count] + [fm_vectors + linear_vectors] * layers
        self.layers = nn.ModuleList(
            WukongLayer(before, fm_vectors, linear_vectors, embedding_dim, rank, fm_hidden, dropout)
            for before in counts[:-1]
        )
        raw = self.embed.inputs - self.embed.count * embedding_dim
        inputs = counts[-1] * embedding_dim + raw
        self.mlp = MLP(inputs, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        state_bnd = self.embed(numeric_bn, embeddings["v"])
        for layer in self.layers:
            state_bnd = layer(state_bnd)
        return label_logits(self.mlp(self.embed.flat(numeric_bn, state_bnd)))


class WukongLayer(nn.Module):
    """LN([FMB(X), LCB(X)] + X): [B, n, D] -> [B, fm_vectors + linear_vectors, D].

    FMB(X) = ReLU(MLP(LN(X (X^T Y)))) with Y [n, rank] learned (eq. 6, the product in the order that costs n D rank);
    LCB(X) = W X. Where the number of vectors changes, X goes through a linear layer over them. The ReLU behind the MLP
    is that of public code.
    """

    def __init__(
        self,
        before: int,
        fm_vectors: int,
        linear_vectors: int,
        dim: int,
        rank: int,
        fm_hidden: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.project = nn.Parameter(torch.empty(before, rank))
        nn.init.xavier_normal_(self.project)
        self.fm_norm = nn.LayerNorm(before * rank)
        self.fm_mlp = MLP(before * rank, fm_hidden, dropout, outputs=fm_vectors * dim)
        self.compress = linear(before, linear_vectors, bias=False) if linear_vectors else None
        after = fm_vectors + linear_vectors
        self.residual = linear(before, after) if before != after else nn.Identity()
        self.norm = nn.LayerNorm(dim)
        self.dim = dim

    def forward(self, state_bnd: Tensor) -> Tensor:
        lying_bdn = state_bnd.transpose(1, 2)
        products = torch.bmm(state_bnd, torch.matmul(lying_bdn, self.project))
        made = [self.fm_mlp(self.fm_norm(products.flatten(1))).relu().unflatten(1, (-1, self.dim))]
        if self.compress is not None:
            made.append(self.compress(lying_bdn).transpose(1, 2))
        return self.norm(torch.cat(made, 1) + self.residual(lying_bdn).transpose(1, 2))
