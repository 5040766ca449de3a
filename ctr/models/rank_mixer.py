"""RankMixer (Zhu et al., CIKM 2025, arXiv 2507.15551)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, need_pairs, need_positive
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError


class RankMixer(Tower):
    """S = LN(mix(X) + X),  X' = LN(FFN_t(S_t) + S)  per layer, on T tokens;  y = sigmoid(MLP(mean_t X_t))  (section 3)

    Tokens: the fields' vectors side by side, in the schema's order, cut into T parts of one width, each through a
    linear layer of its own. mix cuts each token into T heads, and token h becomes the heads h of all tokens, without
    weights. FFN_t is a net of each token's own, with GELU. The paper's mixture of experts is left out.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        tokens: int,
        width: int,
        layers: int,
        expansion: int,
        hidden: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        need_positive(layers=layers, expansion=expansion)
        if tokens < 1 or width < 1 or width % tokens:
            raise ConfigError(f"model.tokens is {tokens}; expected a divisor of model.width, {width}")
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("RankMixer", self.embed.count)
        self.tokens = tokens
        self.part = -(-self.embed.inputs // tokens)
        self.tokenise = PerToken(tokens, self.part, width)
        self.layers = nn.ModuleList(MixerLayer(tokens, width, expansion) for _ in range(layers))
        self.mlp = MLP(width, hidden, dropout, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        flat = self.embed.flat(numeric_bn, self.embed(numeric_bn, embeddings["v"]))
        padded = F.pad(flat, [0, self.tokens * self.part - flat.shape[1]])
        state_btd = self.tokenise(padded.unflatten(1, (self.tokens, self.part)))
        for layer in self.layers:
            state_btd = layer(state_btd)
        return label_logits(self.mlp(state_btd.mean(1)))


class MixerLayer(nn.Module):
    """Token mixing and the tokens' own nets, each with a residual and a layer norm: [B, T, D] -> [B, T, D]."""

    def __init__(self, tokens: int, width: int, expansion: int) -> None:
        super().__init__()
        self.widen, self.narrow = PerToken(tokens, width, expansion * width), PerToken(tokens, expansion * width, width)
        self.mix_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, state_btd: Tensor) -> Tensor:
        tokens = state_btd.shape[1]
        mixed_btd = state_btd.unflatten(2, (tokens, -1)).transpose(1, 2).flatten(2)
        state_btd = self.mix_norm(mixed_btd + state_btd)
        return self.norm(self.narrow(F.gelu(self.widen(state_btd))) + state_btd)


class PerToken(nn.Module):
    """A linear layer of its own for each token: [B, T, inputs] -> [B, T, outputs]."""

    def __init__(self, tokens: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(tokens, 1, outputs))
        for one in self.weight:
            nn.init.xavier_normal_(one)

    def forward(self, state_bti: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, state_bti.transpose(0, 1), self.weight).transpose(0, 1)
