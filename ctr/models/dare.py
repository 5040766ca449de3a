"""DARE, decoupled attention and representation embeddings (Feng et al., ICLR 2025, arXiv 2410.02604)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, need_positive
from tessera.ctr.models.sequences import EventVectors, mean_of_events, one_group, padded, row_of_events, sum_of_events
from tessera.ctr.models.tower import Events, Fields, SequenceTower


class DARE(SequenceTower):
    """Scores and values of events come from two vectors per id, a and r, whose gradients do not meet   (section 4)

    s_l = sum over aligned ids f of <a_t^f, a_l^f> / sqrt(dim),  the `top_k` events with the largest s are kept
    h   = sum_l softmax(s)_l r_l        (over the kept events)
    y   = MLP([r of all fields, h, r_t * h, mean_l r_l])

    One softmax over the kept events follows the search, with the vectors of this step: nothing is stale. An aligned id
    without a field of the row (a bucket of the event's age, an action) has a learned vector as its target: what counts
    of an event besides its likeness. Numbers of events are in r alone, as they are.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        attention_dim: int,
        hidden: Sequence[int],
        top_k: int,
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        need_positive(attention_dim=attention_dim, top_k=top_k)
        self.embedding_dims = {"r": embedding_dim, "a": attention_dim}
        self.group, self.top_k, self.attention_dim = one_group("DARE", fields), top_k, attention_dim
        self.embed = FieldEmbedding(fields, embedding_dim)
        self.values = EventVectors(self.group, embedding_dim)
        self.scores = EventVectors(self.group, attention_dim)
        unknown = sum(target is None for target in self.group.targets)
        self.wanted = torch.nn.Parameter(torch.randn(unknown, attention_dim) * 0.1) if unknown else None
        self.mlp = MLP(
            self.embed.inputs + 3 * self.values.width, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs
        )

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor], events: dict[str, Events]) -> Tensor:
        """Return logits, [B] or of several labels [B, outputs]."""
        of = events[self.group.name]
        r_nd, r_bfd = self.values.events(of, "r"), embeddings["r"]
        weight_n = self._weights(embeddings["a"], of)
        h_bd = sum_of_events(weight_n.unsqueeze(1).to(r_nd.dtype) * r_nd, of.offsets)
        target_bd = self.values.target(r_bfd)
        flat = self.embed.flat(numeric_bn, self.embed(numeric_bn, r_bfd))
        inputs = [flat, h_bd, target_bd * h_bd, mean_of_events(r_nd, of.offsets)]
        return label_logits(self.mlp(torch.cat(inputs, 1)))

    def _weights(self, a_bfd: Tensor, events: Events) -> Tensor:
        """Return the weight of each event, [N]; 0 for those that the search leaves out."""
        parts, unknown = [], 0
        for place in self.group.targets:
            if place is None:
                assert self.wanted is not None
                parts.append(self.wanted[unknown].expand(a_bfd.shape[0], -1).to(a_bfd.dtype))
                unknown += 1
            else:
                parts.append(a_bfd[:, place])
        target_bd = torch.cat(parts, 1)
        of = events.embeddings["a"]
        events_nd = torch.cat([of[name] for name in self.group.ids], 1)
        rows = row_of_events(events.offsets, events_nd.shape[0])
        score_n = (target_bd[rows] * events_nd).sum(1) / math.sqrt(self.attention_dim)
        places = padded(events, self.group.length)
        # Not -inf: the softmax of a row without events would be NaN. What is left out or absent gets weight 0 below.
        score_bl = places.of(score_n, torch.finfo(score_n.dtype).min)
        kept = places.mask
        if torch.compiler.is_compiling():  # a graph does not know how long rows are: there are always top_k more places
            more = score_bl.new_full((score_bl.shape[0], self.top_k), torch.finfo(score_n.dtype).min)
            kept = best(torch.cat([more, score_bl], 1), self.top_k)[:, self.top_k :] & kept
        elif score_bl.shape[1] > self.top_k:
            kept = best(score_bl, self.top_k) & kept
        score_bl = score_bl.masked_fill(~kept, torch.finfo(score_n.dtype).min)
        return places.back(torch.softmax(score_bl, 1) * kept, score_n.shape[0])


def best(score_bl: Tensor, top_k: int) -> Tensor:
    """Return bool [B, L]: the `top_k` largest scores of each row; of equal ones the last in the row, the newest, so
    that the choice does not depend on the other rows. L is at least top_k."""
    least_b1 = score_bl.topk(top_k, 1).values[:, -1:]
    above = score_bl > least_b1
    equal = score_bl == least_b1
    behind = equal.flip(1).cumsum(1).flip(1)  # equal ones from here on, this one too
    return above | (equal & (behind <= top_k - above.sum(1, keepdim=True)))
