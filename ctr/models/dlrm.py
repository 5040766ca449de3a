"""DLRM, the deep learning recommendation model (Naumov et al., 2019, arXiv 1906.00091)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.ctr.models.layers import MLP, InnerProducts, label_logits, need_pairs, need_positive, scalars_of
from tessera.ctr.models.numeric import Raw
from tessera.ctr.models.tower import Fields, Tower


class DLRM(Tower):
    """y = sigmoid(top([z, {<v_i, v_j> : i < j}])),  z = ReLU(bottom(numbers)) one more vector beside those of the ids

    The bottom net makes one vector of all numeric fields: of their values with `numeric=raw`, as in the paper, else of
    their vectors. Vector fields are in it as they are. Without numeric fields there is no z.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        bottom: Sequence[int],
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        need_positive(embedding_dim=embedding_dim)
        need_pairs("DLRM", len(fields))
        self.embedding_dims = {"v": embedding_dim}
        self.scalars, numbers = len(fields.numeric), fields.columns
        embedded = fields.embed_numeric(self.scalars, embedding_dim) if self.scalars else None
        raw = isinstance(embedded, Raw)
        self.numeric = None if raw else embedded
        width = self.scalars * (1 if raw else embedding_dim) + sum(fields.vectors.values())
        self.bottom = MLP(width, bottom, dropout, batch_norm=batch_norm, outputs=embedding_dim) if numbers else None
        vectors = len(fields.ids) + (1 if numbers else 0)
        self.products = InnerProducts(vectors) if vectors > 1 else None
        inputs = (embedding_dim if numbers else 0) + vectors * (vectors - 1) // 2
        self.mlp = MLP(inputs, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = embeddings["v"]
        parts = []
        if self.bottom is not None:
            z_bd = self.bottom(self._numbers(numeric_bn)).relu()
            emb_bfd = torch.cat([z_bd.unsqueeze(1), emb_bfd.to(z_bd.dtype)], 1)
            parts.append(z_bd)
        if self.products is not None:
            parts.append(self.products(emb_bfd))
        return label_logits(self.mlp(torch.cat(parts, 1)))

    def _numbers(self, numeric_bn: Tensor) -> Tensor:
        if self.numeric is None:
            return numeric_bn
        embedded = self.numeric(scalars_of(numeric_bn, self.scalars)).flatten(1)
        return (
            embedded if numeric_bn.shape[1] == self.scalars else torch.cat([embedded, numeric_bn[:, self.scalars :]], 1)
        )
