"""DeepFM (Guo et al., IJCAI 2017, arXiv 1703.04247)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctr.models.layers import MLP, FactorizationMachine, NumericEmbedding
from ctr.models.tower import Fields, Tower


class DeepFM(Tower):
    """y = sigmoid(w0 + <w, x> + sum_{i<j} <v_i, v_j> x_i x_j + MLP(concat_i v_i x_i))   (section 2.1)

    The factorization machine and the MLP read the same embeddings v. First-order weights w are a second table of
    dim 1 on the same ids. A numeric field i has one vector v_i and one weight w_i, scaled by its value.
    """

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        hidden: Sequence[int],
        dropout: float,
        batch_norm: bool,
        numeric_init_std: float,
    ) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim, "w": 1}
        self.numeric_v = NumericEmbedding(len(fields.numeric), embedding_dim, numeric_init_std)
        self.numeric_w = nn.Parameter(torch.zeros(len(fields.numeric)))
        self.bias = nn.Parameter(torch.zeros(()))
        self.fm = FactorizationMachine()
        self.mlp = MLP(len(fields) * embedding_dim, hidden, dropout, batch_norm)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = torch.cat([self.numeric_v(numeric_bn), embeddings["v"]], 1)
        first_order = self.bias + numeric_bn @ self.numeric_w + embeddings["w"].sum((1, 2))
        return first_order + self.fm(emb_bfd) + self.mlp(emb_bfd.flatten(1)).squeeze(1)
