"""DIN, deep interest network (Zhou et al., KDD 2018, arXiv 1706.06978)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, linear
from tessera.ctr.models.sequences import Dice, EventVectors, padded, row_of_events, sum_of_events, with_target
from tessera.ctr.models.tower import Events, Fields, SequenceGroup, SequenceTower
from tessera.embedding.errors import ConfigError


class DIN(SequenceTower):
    """y = sigmoid(MLP([all fields of the row, o_1, .., o_G])), o_g the row's interest in its target by group g of
    sequences (`TargetAttention`)   (section 4.3)"""

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        hidden: Sequence[int],
        attention_hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
        softmax: bool,
    ) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim}
        if not fields.sequences:
            raise ConfigError("model.target is DIN, and no feature is a sequence with pooling: none; expected one")
        self.groups = [with_target("DIN", group) for group in fields.sequences]
        self.embed = FieldEmbedding(fields, embedding_dim)
        self.attention = nn.ModuleList(
            TargetAttention(group, embedding_dim, attention_hidden, softmax=softmax) for group in self.groups
        )
        width = sum(group.width for group in self._attention())
        self.mlp = MLP(self.embed.inputs + width, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def _attention(self) -> list[TargetAttention]:
        return [one for one in self.attention if isinstance(one, TargetAttention)]

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor], events: dict[str, Events]) -> Tensor:
        """Return logits, [B] or of several labels [B, outputs]."""
        flat = self.embed.flat(numeric_bn, self.embed(numeric_bn, embeddings["v"]))
        interest = [
            attend(embeddings["v"], events[group.name])
            for group, attend in zip(self.groups, self.attention, strict=True)
        ]
        return label_logits(self.mlp(torch.cat([flat, *interest], 1)))


class TargetAttention(nn.Module):
    """w_l = MLP([q, k_l, q - k_l, q * k_l]), o = sum_l w_l k_l   (section 4.3), q the target, k_l event l.

    The MLP has Dice between its layers and one unit without activation at its end. Weights are not normalised, so that
    o says how much of the history is like the target; with `softmax` they are, over the row's events.

    It runs over the batch's events without padding. Attributes: width: of o.
    """

    def __init__(self, group: SequenceGroup, dim: int, hidden: Sequence[int], *, softmax: bool) -> None:
        super().__init__()
        self.vectors, self.softmax, self.length = EventVectors(group, dim), softmax, group.length
        self.width = inputs = self.vectors.width
        layers: list[nn.Module] = []
        inputs *= 4
        for units in hidden:
            layers += [linear(inputs, units), Dice(units)]
            inputs = units
        self.score = nn.Sequential(*layers, linear(inputs, 1))

    def forward(self, emb_bfd: Tensor, events: Events) -> Tensor:
        """Map [B, id fields, dim] and events to [B, width]."""
        k_nd, offsets = self.vectors.events(events), events.offsets
        q_nd = self.vectors.target(emb_bfd)[row_of_events(offsets, k_nd.shape[0])]
        w_n1 = self.score(torch.cat([q_nd, k_nd, q_nd - k_nd, q_nd * k_nd], 1))
        if self.softmax:
            places = padded(events, self.length)
            w_bl = torch.softmax(places.of(w_n1.squeeze(1), torch.finfo(w_n1.dtype).min), 1)
            w_n1 = places.back(w_bl, k_nd.shape[0]).unsqueeze(1)
        return sum_of_events(w_n1.to(k_nd.dtype) * k_nd, offsets)
