"""xDeepFM (Lian et al., KDD 2018, arXiv 1803.05170)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, FirstOrder, in_pieces, label_logits, linear, need_pairs
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError


class XDeepFM(Tower):
    """y = sigmoid(w0 + <w, x> + w_c^T p + MLP(concat_i e_i)),  p the sum-pooled maps of the CIN   (section 3.3)"""

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        maps: Sequence[int],
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        if not maps:
            raise ConfigError("model.maps is empty; expected the feature maps of each CIN layer, for example [16, 16]")
        self.embedding_dims = {"v": embedding_dim, "w": fields.outputs}
        self.first_order = FirstOrder(fields)
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("XDeepFM", self.embed.count)
        self.cin = CIN(self.embed.count, maps)
        self.cin_output = linear(sum(maps), fields.outputs, bias=False)
        self.mlp = MLP(self.embed.inputs, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        deep = self.cin_output(self.cin(emb_bfd)) + self.mlp(self.embed.flat(numeric_bn, emb_bfd))
        return self.first_order(numeric_bn, embeddings["w"]) + label_logits(deep)


class CIN(nn.Module):
    """Compressed interaction network (eqs. 6, 7): X^k_h = sum_ij W^{k,h}_ij (X^{k-1}_i * X^0_j), p = concat_k sum_d X^k

    Without an activation, which the paper found best (section 4.4); every map goes on to the output and the next layer.
    """

    def __init__(self, fields: int, maps: Sequence[int]) -> None:
        super().__init__()
        widths = [fields, *maps]
        self.layers = nn.ModuleList(
            linear(before * fields, after, bias=False) for before, after in zip(widths, maps, strict=False)
        )

    def forward(self, emb_bfd: Tensor) -> Tensor:
        """Map [B, F, D] to [B, sum of maps]."""
        return in_pieces(self._pooled_maps, emb_bfd)

    def _pooled_maps(self, emb_bfd: Tensor) -> Tensor:
        # Coordinates are independent: with the field axis last, a layer is one product over B * D rows.
        first_bdf = emb_bfd.transpose(1, 2).contiguous()
        state, pooled = first_bdf, []
        for layer in self.layers:
            state = layer((state.unsqueeze(3) * first_bdf.unsqueeze(2)).flatten(2))
            pooled.append(state.sum(1))
        return torch.cat(pooled, 1)
