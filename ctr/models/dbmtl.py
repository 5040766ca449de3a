"""Labels that depend on each other (deep Bayesian multi-target learning, Wang et al., arXiv 1902.09154)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tessera.ctr.models.experts import Experts, check_widths, side_by_side
from tessera.ctr.models.layers import MLP, linear
from tessera.ctr.models.tower import Fields, Tower


class DBMTL(Tower):
    """h = bottom(x);  h_t = MLP_t(h);  r_t = MLP([h_t, r_1, .., r_{t-1}]);  z_t = w_t r_t + b_t   (section 3)

    The probability of a label is one given those that the schema lists before it, by their hidden states, so that
    feedback on a later label reaches the nets of the earlier ones.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        bottom: Sequence[int],
        head: Sequence[int],
        relation: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
        body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_widths("model.head", head)
        check_widths("model.relation", relation)
        self.bottom = Experts(fields, embedding_dim, 1, bottom, dropout, batch_norm=batch_norm, body=body)
        self.embedding_dims = self.bottom.embedding_dims
        count = len(fields.labels)
        self.heads = nn.ModuleList(
            MLP(self.bottom.width, head, dropout, batch_norm=batch_norm, outputs=None) for _ in range(count)
        )
        self.relations = nn.ModuleList(
            MLP(head[-1] + number * relation[-1], relation, dropout, batch_norm=batch_norm, outputs=None)
            for number in range(count)
        )
        self.outputs = nn.ModuleList(linear(relation[-1], 1) for _ in range(count))

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        state = self.bottom(numeric_bn, embeddings)[0].squeeze(1)
        related: list[Tensor] = []
        for head, relation in zip(self.heads, self.relations, strict=True):
            related.append(relation(torch.cat([head(state), *related], 1)))
        return side_by_side([output(one) for output, one in zip(self.outputs, related, strict=True)])
