"""KPNN, the kernel-product network (Qu et al., TOIS 2018, arXiv 1807.00311; authors' product-nets-distributed)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, InnerProducts, in_pieces, label_logits, need_pairs, pairs
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

KERNELS = ("mat", "vec", "num")


class KPNN(Tower):
    """y = sigmoid(MLP(concat(e_1, .., e_F, {e_i^T K_ij e_j : i < j})))

    K_ij is a matrix (mat), a diagonal (vec) or a multiple of the identity (num); it begins as the identity.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        kernel: str,
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ConfigError(f"model.kernel is {kernel!r}; expected {', '.join(KERNELS)}")
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("KPNN", self.embed.count)
        self.products = KernelProducts(self.embed.count, embedding_dim, kernel)
        self.mlp = MLP(
            self.embed.inputs + self.products.count, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs
        )

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        return label_logits(self.mlp(torch.cat([self.embed.flat(numeric_bn, emb_bfd), self.products(emb_bfd)], 1)))


class KernelProducts(nn.Module):
    """e_i^T K_ij e_j of all pairs i < j, in the order of `pairs`."""

    first: Tensor
    second: Tensor

    def __init__(self, fields: int, dim: int, kernel: str) -> None:
        super().__init__()
        first, second = pairs(fields)
        self.count = len(first)
        self.kernel_type = kernel
        if kernel == "num":
            self.kernel = nn.Parameter(torch.ones(self.count))
            self.inner = InnerProducts(fields)
        else:
            self.kernel = nn.Parameter(
                torch.ones(self.count, dim, 1) if kernel == "vec" else torch.eye(dim).repeat(self.count, 1, 1)
            )
            self.register_buffer("first", first, persistent=False)
            self.register_buffer("second", second, persistent=False)

    def forward(self, emb_bfd: Tensor) -> Tensor:
        """Map [B, F, D] to [B, F (F - 1) / 2]."""
        if self.kernel_type == "num":
            return self.inner(emb_bfd) * self.kernel
        return in_pieces(self._products, emb_bfd)

    def _products(self, emb_bfd: Tensor) -> Tensor:
        # Fields first, so that choosing pairs copies whole blocks and each pair's product is one over the batch.
        emb_fbd = emb_bfd.transpose(0, 1).contiguous()
        left_pbd, right_pbd = emb_fbd.index_select(0, self.first), emb_fbd.index_select(0, self.second)
        if self.kernel_type == "vec":
            return torch.bmm(left_pbd * right_pbd, self.kernel).squeeze(2).t()
        return (torch.bmm(left_pbd, self.kernel) * right_pbd).sum(2).t()
