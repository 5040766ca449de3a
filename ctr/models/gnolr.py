"""Nested ordinal regression over a funnel of labels with two towers (GNOLR, KDD 2025; equations of its public code)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.models.experts import check_widths, need_funnel, perceptron
from tessera.ctr.models.layers import FieldEmbedding
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError, did_you_mean


class GNOLR(Tower):
    """s_i = cos(user_i, item_i);  Z_i = sum_{j<=i} S_j s_j;  P(level >= i) = sigmoid(Z_i - a_i) = q_i

    Level 0 is an impression, 1 a click, 2 a click and a purchase, ... p_i is the share of rows that reach level i
    (`shares`), a_i = -ln(p_i / (1 - p_i)), S_i the `slopes`; one pair of nets per level. As |s_i| <= 1, levels cannot
    cross while S_i < a_i - a_{i-1}; other slopes are refused.

    L = sum_i L_i with L_i = -[level = 0] ln(1 - q_1) - sum_{j<i} [level = j] ln(q_j - q_{j+1}) - [level >= i] ln q_i.
    With c_i = q_i / q_{i-1}, q_j - q_{j+1} = q_j (1 - c_{j+1}), so L is K times the cross-entropy of the first label,
    plus K - 1 times that of the second where the first is 1, and so on: the tower answers the logits of c_i, and
    `loss_weights` are K, K - 1, ..
    """

    has_heads = True
    is_nested = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        user: Sequence[str],
        shares: Sequence[float],
        slopes: Sequence[float],
        hidden: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        need_funnel("GNOLR", fields)
        check_widths("model.hidden", hidden)
        count = len(fields.labels)
        self.offsets = _offsets(shares, slopes, count)
        self.slopes = [float(slope) for slope in slopes]
        self.loss_weights = tuple(float(count - i) for i in range(count))
        self.embedding_dims = {"v": embedding_dim}
        sides = [_Side(fields, chosen, embedding_dim) for chosen in _split(fields, user)]
        self.sides = nn.ModuleList(sides)
        self.nets = nn.ModuleList(
            nn.ModuleList(perceptron(side.embed.inputs, hidden, dropout, batch_norm=False) for _ in range(count))
            for side in sides
        )

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        user, item = (side(numeric_bn, embeddings["v"]) for side in self.sides)
        level, logits = numeric_bn.new_zeros(()), []
        users, items = (cast(nn.ModuleList, nets) for nets in self.nets)
        for i, (net_u, net_i) in enumerate(zip(users, items, strict=True)):
            part = self.slopes[i] * F.cosine_similarity(_wide(net_u(user)), _wide(net_i(item)), dim=1)
            if i == 0:
                level = part - self.offsets[0]
                logits.append(level)
                continue
            # q_i / q_{i-1} with q = sigmoid(level): its odds are (1 + e^level) / (e^gap - 1) as level falls by gap > 0.
            gap = self.offsets[i] - self.offsets[i - 1] - part
            logits.append(F.softplus(level) - gap - torch.log(-torch.expm1(-gap)))
            level = level - gap
        return torch.stack(logits, 1)


def _wide(state: Tensor) -> Tensor:
    """Return it in float32 where the tower runs in bfloat16: levels lie close to each other."""
    return state.float() if state.dtype == torch.bfloat16 else state


class _Side(nn.Module):
    """The fields of one side, side by side: [B, columns], [B, id fields, dim] -> [B, inputs]."""

    numeric: Tensor
    ids: Tensor

    def __init__(self, fields: Fields, chosen: Sequence[str], dim: int) -> None:
        super().__init__()
        numeric = [name for name in fields.numeric if name in chosen]
        vectors = {name: length for name, length in fields.vectors.items() if name in chosen}
        ids = [name for name in fields.ids if name in chosen]
        columns = [fields.numeric.index(name) for name in numeric]
        first = len(fields.numeric)
        for name, length in fields.vectors.items():
            columns += range(first, first + length) if name in vectors else ()
            first += length
        self.register_buffer("numeric", torch.tensor(columns).long(), persistent=False)
        self.register_buffer("ids", torch.tensor([fields.ids.index(name) for name in ids]).long(), persistent=False)
        self.embed = FieldEmbedding(
            Fields(tuple(numeric), tuple(ids), fields.embed_numeric, vectors=vectors), dim, side_by_side=True
        )

    def forward(self, numeric_bn: Tensor, emb_bfd: Tensor) -> Tensor:
        numeric = numeric_bn.index_select(1, self.numeric)
        return self.embed.flat(numeric, self.embed(numeric, emb_bfd.index_select(1, self.ids)))


def _split(fields: Fields, user: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the fields of both sides."""
    names = [*fields.numeric, *fields.vectors, *fields.ids]
    for name in user:
        if name not in names:
            raise ConfigError(f"model.user names {name!r}, which is no feature{did_you_mean(name, names)}")
    item = [name for name in names if name not in user]
    if not user or not item:
        raise ConfigError(
            f"model.user has {len(user)} of {len(names)} features; expected those of the user or the request, all "
            "others being the item's"
        )
    return list(user), item


def _offsets(shares: Sequence[float], slopes: Sequence[float], count: int) -> list[float]:
    """Return a_i of each level, rising. Raises ConfigError where a probability could be negative."""
    for key, found in (("shares", shares), ("slopes", slopes)):
        if len(found) != count:
            raise ConfigError(f"model.{key} has {len(found)} numbers; expected one for each of {count} labels")
    falls = all(a > b for a, b in zip([1.0, *shares], [*shares, 0.0], strict=True))
    if not falls:
        raise ConfigError(
            f"model.shares is {list(shares)}; expected the shares of rows that reach each level, falling from below 1"
        )
    offsets = [-math.log(share / (1 - share)) for share in shares]
    for i, slope in enumerate(slopes):
        room = offsets[i] - offsets[i - 1] if i else math.inf
        if not 0 < slope < room:
            limit = f" and less than {room:.4g}, how far level {i + 1} lies from level {i} by model.shares" if i else ""
            raise ConfigError(
                f"model.slopes[{i}] is {slope:g}; expected more than 0{limit}"
                + (": otherwise a probability can be negative" if i else "")
            )
    return offsets
