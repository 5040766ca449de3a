"""Entire-space model of a funnel (Ma et al., SIGIR 2018, arXiv 1804.07931)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tessera.ctr.models.experts import body_of, need_funnel, side_by_side
from tessera.ctr.models.layers import MLP, FieldEmbedding
from tessera.ctr.models.tower import Fields, Tower


class ESMM(Tower):
    """pCTR = sigmoid(z_1), pCVR = sigmoid(z_2), pCTCVR = pCTR pCVR, over shared embeddings   (section 2.3)

    L = CE(click, pCTR) + CE(click and buy, pCTCVR), both over all impressions: pCVR has no loss of its own, so it is
    learnt on all rows and not on clicked ones alone. A longer funnel multiplies on. Each net is an MLP or another model
    of the project (`body`).
    """

    has_heads = True
    trains_joint = True
    is_nested = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
        body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        need_funnel("ESMM", fields)
        self.embedding_dims = {"v": embedding_dim}
        self.towers = body is not None
        if body is None:
            self.embed = FieldEmbedding(fields, embedding_dim, side_by_side=True)
            nets: list[nn.Module] = [
                MLP(self.embed.inputs, hidden, dropout, batch_norm=batch_norm) for _ in fields.labels
            ]
        else:
            towers = [body_of(body, fields, embedding_dim, 1) for _ in fields.labels]
            self.embedding_dims |= towers[0].embedding_dims
            nets = list(towers)
        self.nets = nn.ModuleList(nets)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        if self.towers:
            return side_by_side([net(numeric_bn, embeddings).unsqueeze(1) for net in self.nets])
        flat = self.embed.flat(numeric_bn, self.embed(numeric_bn, embeddings["v"]))
        return side_by_side([net(flat) for net in self.nets])
