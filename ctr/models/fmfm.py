"""FmFM, the field-matrixed factorization machine (Sun et al., WWW 2021, arXiv 2102.12994)."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ctr.models.kpnn import KernelProducts
from tessera.ctr.models.layers import FieldEmbedding, FirstOrder, linear, need_pairs
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

KERNELS = ("mat", "vec")


class FmFM(Tower):
    """y = sigmoid(w0 + <w, x> + sum_{i<j} e_i^T M_ij e_j)   (eq. 7): one matrix M_ij, or diagonal (vec: the paper's
    FvFM), for each pair of fields. M_ij begins as the identity, where the model is FM. Of several labels each has a
    weight of each pair, 1 at first."""

    has_heads = True

    def __init__(self, fields: Fields, embedding_dim: int, kernel: str) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ConfigError(f"model.kernel is {kernel!r}; expected {' or '.join(KERNELS)}")
        self.embedding_dims = {"v": embedding_dim, "w": fields.outputs}
        self.first_order = FirstOrder(fields)
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("FmFM", self.embed.count)
        self.products = KernelProducts(self.embed.count, embedding_dim, kernel)
        self.output = linear(self.products.count, fields.outputs, bias=False) if fields.outputs > 1 else None
        if self.output is not None:
            torch.nn.init.ones_(self.output.weight)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        products = self.products(emb_bfd)
        crossed = products.sum(1) if self.output is None else self.output(products)
        return self.first_order(numeric_bn, embeddings["w"]) + crossed
