"""MaskNet (Wang et al., DLP-KDD 2021, arXiv 2102.07619)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.models.dropout import Dropout
from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, linear, need_positive
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

STRUCTURES = ("serial", "parallel")


class MaskNet(Tower):
    """h = ReLU(LN(W (mask(e) * x))) per block, mask(e) = W_2 ReLU(W_1 e + a_1) + a_2, e the embeddings (eqs. 4 to 9)

    serial:   block l reads x = h_{l-1}, the first LN_emb(e);  y = sigmoid(w^T h_L)
    parallel: all `blocks` read LN_emb(e);  y = sigmoid(MLP([h_1, .., h_blocks]))   (section 3.5)

    LN_emb normalises each field's vector by itself.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        structure: str,
        hidden: Sequence[int],
        blocks: int,
        block_width: int,
        mask_ratio: float,
        dropout: float,
        *,
        norm_embeddings: bool,
        norm_blocks: bool,
    ) -> None:
        super().__init__()
        if structure not in STRUCTURES:
            raise ConfigError(f"model.structure is {structure!r}; expected {' or '.join(STRUCTURES)}")
        if structure == "serial" and not hidden:
            raise ConfigError("model.hidden is empty; expected the width of each block, for example [400, 400]")
        if structure == "parallel":
            need_positive(blocks=blocks, block_width=block_width)
        if mask_ratio <= 0:
            raise ConfigError(f"model.mask_ratio is {mask_ratio}; expected a number above 0")
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        self.norm = FieldNorm(self.embed.count, embedding_dim) if norm_embeddings else nn.Identity()
        inputs, self.serial = self.embed.inputs, structure == "serial"
        widths = [inputs, *hidden] if self.serial else [inputs, block_width]
        pairs = list(zip(widths, widths[1:], strict=False)) if self.serial else [(inputs, block_width)] * blocks
        self.blocks = nn.ModuleList(
            MaskBlock(inputs, before, after, mask_ratio, dropout, norm=norm_blocks) for before, after in pairs
        )
        last = [] if self.serial else hidden
        width = widths[-1] * (1 if self.serial else blocks)
        self.mlp = MLP(width, last, dropout, batch_norm=False, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        first = self.embed.flat(numeric_bn, emb_bfd)
        state = self.embed.flat(numeric_bn, self.norm(emb_bfd))
        if not self.serial:
            return label_logits(self.mlp(torch.cat([block(first, state) for block in self.blocks], 1)))
        for block in self.blocks:
            state = block(first, state)
        return label_logits(self.mlp(state))


class MaskBlock(nn.Module):
    """ReLU(LN(W (mask(e) * x))): e [B, inputs], x [B, width] -> [B, outputs]. The mask's hidden layer is `ratio`
    times as wide as x."""

    def __init__(self, inputs: int, width: int, outputs: int, ratio: float, dropout: float, *, norm: bool) -> None:
        super().__init__()
        between = max(1, int(width * ratio))
        self.mask = nn.Sequential(linear(inputs, between), nn.ReLU(), linear(between, width))
        self.weight = linear(width, outputs, bias=False)
        self.norm = nn.LayerNorm(outputs) if norm else nn.Identity()
        self.dropout = Dropout(dropout)

    def forward(self, first: Tensor, state: Tensor) -> Tensor:
        return self.dropout(self.norm(self.weight(self.mask(first) * state)).relu())


class FieldNorm(nn.Module):
    """Layer norm of each field's vector, with a scale and a shift of its own: [B, F, D] -> [B, F, D]."""

    def __init__(self, fields: int, dim: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(fields, dim)), nn.Parameter(torch.zeros(fields, dim))

    def forward(self, emb_bfd: Tensor) -> Tensor:
        return F.layer_norm(emb_bfd, emb_bfd.shape[2:]) * self.scale + self.shift
