"""DIEN, deep interest evolution network (Zhou et al., AAAI 2019, arXiv 1809.03672)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, linear
from tessera.ctr.models.sequences import EventVectors, one_group, padded, with_target
from tessera.ctr.models.tower import Events, Fields, SequenceGroup, SequenceTower
from tessera.embedding.errors import ConfigError, did_you_mean


class DIEN(SequenceTower):
    """A GRU reads the events, a second one follows of its states what is like the target   (section 4)

    h_t = GRU(e_t, h_{t-1}),  a_t = softmax_t MLP([q, h_t, q - h_t, q * h_t]),  q the target
    s_t = AUGRU(h_t, s_{t-1}): a GRU whose update gate is a_t u_t     (`GatedUnit`)
    y   = MLP([all fields of the row, s of its last event])

    `negatives` name for sequences of the group others of it, of events that did not happen (items that were shown and
    not clicked, or drawn ones). With them h_t learns to tell the next event from that: beside the labels there is
    `auxiliary` times the mean over a row's events, from the second on, of
    softplus(-net([h_{t-1}, e_t])) + softplus(net([h_{t-1}, n_t]))     (eq. 6, whose sum over events is a mean here)
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        hidden: Sequence[int],
        attention_hidden: Sequence[int],
        negatives: Mapping[str, str] | None,
        auxiliary: float,
        auxiliary_hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        if auxiliary < 0:
            raise ConfigError(f"model.auxiliary is {auxiliary:g}; expected 0 or more")
        if negatives is not None and not isinstance(negatives, Mapping):
            raise ConfigError(
                f"model.negatives is {negatives}; expected sequences by name, {{history: shown}}, or null"
            )
        self.embedding_dims, negatives = {"v": embedding_dim}, negatives or {}
        whole = one_group("DIEN", fields)
        self.group, self.other = with_target("DIEN", happened(whole, negatives)), did_not(whole, negatives)
        self.embed = FieldEmbedding(fields, embedding_dim)
        self.vectors = EventVectors(self.group, embedding_dim)
        width = self.vectors.width
        self.extractor, self.evolution = GatedUnit(width), GatedUnit(width)
        # A bias behind it moves no weight of the softmax: its gradient would be rounding noise.
        self.score = scores(4 * width, attention_hidden, bias=False)
        self.auxiliary = auxiliary if self.other is not None else 0.0
        self.next_event = scores(2 * width, auxiliary_hidden) if self.auxiliary else None
        self.others = EventVectors(self.other, embedding_dim) if self.other is not None else None
        self.mlp = MLP(self.embed.inputs + width, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor], events: dict[str, Events]) -> Tensor:
        """Return logits, [B] or of several labels [B, outputs]."""
        of, emb_bfd, length = events[self.group.name], embeddings["v"], self.group.length
        if torch.compiler.is_compiling():  # a graph has a step for each event that a row may have
            of = replace(of, longest=length)
        places = padded(of, length)
        if not places.mask.shape[1]:  # a batch without events: a step that changes nothing, for the gradients
            places = padded(replace(of, longest=1), length)
        e_bld = places.of(self.vectors.events(of))
        h_bld = self.extractor(e_bld, places.mask)
        q_bld = self.vectors.target(emb_bfd).unsqueeze(1).expand_as(h_bld)
        a_bl = self.score(torch.cat([q_bld, h_bld, q_bld - h_bld, q_bld * h_bld], 2)).squeeze(2)
        a_bl = torch.softmax(torch.where(places.mask, a_bl, torch.finfo(a_bl.dtype).min), 1)
        s_bld = self.evolution(h_bld, places.mask, a_bl)
        if self.training and self.next_event is not None and self.others is not None:
            n_bld = places.of(self.others.events(of))
            self.extra_loss = self.auxiliary * self._next_events(h_bld, e_bld, n_bld, places.mask)
        flat = self.embed.flat(numeric_bn, self.embed(numeric_bn, emb_bfd))
        return label_logits(self.mlp(torch.cat([flat, s_bld[:, -1]], 1)))

    def _next_events(self, h_bld: Tensor, e_bld: Tensor, n_bld: Tensor, mask_bl: Tensor) -> Tensor:
        """Return the loss of telling next events from the others, the mean over each row's, [B]."""
        assert self.next_event is not None
        before, pairs = h_bld[:, :-1], mask_bl[:, 1:]
        yes, no = (self.next_event(torch.cat([before, one[:, 1:]], 2)).squeeze(2) for one in (e_bld, n_bld))
        if yes.dtype == torch.bfloat16:
            yes, no = yes.float(), no.float()
        losses = (F.softplus(-yes) + F.softplus(no)) * pairs
        return losses.sum(1) / pairs.sum(1).clamp_min(1)


class GatedUnit(nn.Module):
    """u = sigmoid(W_u x + U_u h + b_u), r likewise, n = tanh(W x + r * U h + b),  h <- (1 - a u) h + a u n

    Section 4.2. a is the event's attention (AUGRU, section 4.3), or 1. h begins with zeros, and stays where there is no
    event. In torch's GRU the update gate is 1 - u.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_input, self.of_state = linear(width, 3 * width), linear(width, 3 * width, bias=False)

    def forward(self, x_bld: Tensor, mask_bl: Tensor, attention_bl: Tensor | None = None) -> Tensor:
        """Map events [B, L, width], L at least 1, to the states behind them, [B, L, width]."""
        inputs = self.of_input(x_bld)
        h_bd, states = x_bld.new_zeros(x_bld.shape[0], x_bld.shape[2]), []
        for place in range(x_bld.shape[1]):
            u_x, r_x, n_x = inputs[:, place].chunk(3, 1)
            u_h, r_h, n_h = self.of_state(h_bd).chunk(3, 1)
            u_bd = torch.sigmoid(u_x + u_h)
            if attention_bl is not None:
                u_bd = attention_bl[:, place, None] * u_bd
            n_bd = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
            h_bd = torch.where(mask_bl[:, place, None], h_bd + u_bd * (n_bd - h_bd), h_bd)
            states.append(h_bd)
        return torch.stack(states, 1)


def scores(inputs: int, hidden: Sequence[int], *, bias: bool = True) -> nn.Sequential:
    """Return a net with sigmoids between its layers, as in the authors' code, and one unit at its end."""
    layers: list[nn.Module] = []
    for units in hidden:
        layers += [linear(inputs, units), nn.Sigmoid()]
        inputs = units
    return nn.Sequential(*layers, linear(inputs, 1, bias=bias))


def happened(group: SequenceGroup, negatives: Mapping[str, str]) -> SequenceGroup:
    """Return the group without the sequences of events that did not happen.

    Raises ConfigError: `negatives` names no sequences of ids of the group, or one for two.
    """
    for name in (*negatives, *negatives.values()):
        if name not in group.ids:
            raise ConfigError(
                f"model.negatives names {name!r}, which is no sequence of ids of {group.name!r}"
                f"{did_you_mean(name, group.ids, 'expected one of ' + ', '.join(group.ids))}"
            )
    for name, other in negatives.items():
        if other in negatives or list(negatives.values()).count(other) > 1:
            raise ConfigError(f"model.negatives: {other!r} stands for {name!r} and elsewhere; expected it once")
    kept = [place for place, name in enumerate(group.ids) if name not in negatives.values()]
    return replace(
        group,
        ids=tuple(group.ids[place] for place in kept),
        targets=tuple(group.targets[place] for place in kept),
    )


def did_not(group: SequenceGroup, negatives: Mapping[str, str]) -> SequenceGroup | None:
    """Return `happened`'s group with negatives in their places, of ids that have one; None without any."""
    own = happened(group, negatives)
    return replace(own, ids=tuple(negatives.get(name, name) for name in own.ids)) if negatives else None
