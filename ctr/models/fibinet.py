"""FiBiNET (Huang et al., RecSys 2019, arXiv 1905.09433)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import (
    MLP,
    FieldEmbedding,
    FirstOrder,
    in_pieces,
    label_logits,
    linear,
    need_pairs,
    need_positive,
    pairs,
)
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

BILINEAR = ("all", "each", "interaction")


class FiBiNET(Tower):
    """y = sigmoid(w0 + <w, x> + MLP([p, q])),  p the bilinear products of the fields' vectors, q those of the vectors
    that SENet has weighed   (eqs. 3 to 9)"""

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        bilinear: str,
        reduction: int,
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        if bilinear not in BILINEAR:
            raise ConfigError(f"model.bilinear is {bilinear!r}; expected {', '.join(BILINEAR)}")
        need_positive(reduction=reduction)
        self.embedding_dims = {"v": embedding_dim, "w": fields.outputs}
        self.first_order = FirstOrder(fields)
        self.embed = FieldEmbedding(fields, embedding_dim)
        count = self.embed.count
        need_pairs("FiBiNET", count)
        between = max(1, count // reduction)
        self.weigh = nn.Sequential(
            linear(count, between, bias=False), nn.ReLU(), linear(between, count, bias=False), nn.ReLU()
        )
        self.plain, self.weighed = (BilinearProducts(count, embedding_dim, bilinear) for _ in range(2))
        raw = self.embed.inputs - count * embedding_dim
        inputs = count * (count - 1) * embedding_dim + raw
        self.mlp = MLP(inputs, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        weighed_bfd = emb_bfd * self.weigh(emb_bfd.mean(2)).unsqueeze(2)
        products = torch.cat([self.plain(emb_bfd), self.weighed(weighed_bfd)], 1)
        return self.first_order(numeric_bn, embeddings["w"]) + label_logits(
            self.mlp(self.embed.flat(numeric_bn, products))
        )


class BilinearProducts(nn.Module):
    """(e_i W) * e_j of all pairs i < j, in the order of `pairs`: [B, F, D] -> [B, F (F - 1) / 2 * D].

    all: one W; each: one for each left field i; interaction: one for each pair.
    """

    first: Tensor
    second: Tensor

    def __init__(self, fields: int, dim: int, kind: str) -> None:
        super().__init__()
        first, second = pairs(fields)
        count = {"all": 1, "each": fields, "interaction": len(first)}[kind]
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(count, dim, dim))
        for one in self.weight:
            nn.init.xavier_normal_(one)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)

    def forward(self, emb_bfd: Tensor) -> Tensor:
        return in_pieces(self._products, emb_bfd)

    def _products(self, emb_bfd: Tensor) -> Tensor:
        # Fields first, so that choosing pairs copies whole blocks and each matrix multiplies the rows of the batch.
        emb_fbd = emb_bfd.transpose(0, 1).contiguous()
        if self.kind == "interaction":
            left_pbd = torch.bmm(emb_fbd.index_select(0, self.first), self.weight)
        else:
            times_w = torch.matmul(emb_fbd, self.weight[0]) if self.kind == "all" else torch.bmm(emb_fbd, self.weight)
            left_pbd = times_w.index_select(0, self.first)
        return (left_pbd * emb_fbd.index_select(0, self.second)).transpose(0, 1).flatten(1)
