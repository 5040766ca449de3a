"""BST, the behavior sequence transformer (Chen et al., DLP-KDD 2019, arXiv 1905.06874)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.models.dropout import Dropout
from tessera.ctr.models.layers import MLP, FieldEmbedding, label_logits, linear, need_positive
from tessera.ctr.models.sequences import EventVectors, Padded, one_group, padded
from tessera.ctr.models.tower import Events, Fields, SequenceTower
from tessera.embedding.errors import ConfigError

POOLINGS = ("concat", "target")


class BST(SequenceTower):
    """The target and its row's events, newest first, are the tokens of a transformer   (section 2)

    x = W [embeddings of the token] + position;  x = layer_n(.. layer_1(x))     (`EncoderLayer`)
    y = sigmoid(MLP([all fields of the row, x of all tokens]))

    Every token sees all of its row. `pooling`: the MLP has the states of all places, zeros where there is no event
    (concat, as in the paper), or the target's alone (target). Positions are counted from the target, 0.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        width: int,
        layers: int,
        heads: int,
        feed_forward: int,
        hidden: Sequence[int],
        pooling: str,
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        need_positive(width=width, layers=layers, feed_forward=feed_forward)
        if heads < 1 or width % heads:
            raise ConfigError(f"model.heads is {heads}; expected a divisor of model.width, {width}")
        if pooling not in POOLINGS:
            raise ConfigError(f"model.pooling is {pooling!r}; expected concat or target")
        self.embedding_dims = {"v": embedding_dim}
        self.group, self.concat = one_group("BST", fields), pooling == "concat"
        self.embed = FieldEmbedding(fields, embedding_dim)
        self.vectors = EventVectors(self.group, embedding_dim)
        self.of_token = linear(self.vectors.width, width)
        self.position = nn.Parameter(torch.randn(self.group.length + 1, width) * 0.02)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, feed_forward, dropout) for _ in range(layers))
        states = width * (self.group.length + 1 if self.concat else 1)
        self.mlp = MLP(self.embed.inputs + states, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor], events: dict[str, Events]) -> Tensor:
        """Return logits, [B] or of several labels [B, outputs]."""
        of, emb_bfd = events[self.group.name], embeddings["v"]
        places = newest_first(padded(of, self.group.length))
        events_bld = places.of(self.of_token(self.vectors.events(of)))
        target_bd = self.of_token(self.vectors.target(emb_bfd))
        x_bld = torch.cat([target_bd.unsqueeze(1), events_bld], 1)
        there = F.pad(places.mask, (1, 0), value=True)
        places_of = torch.arange(x_bld.shape[1], device=x_bld.device).clamp_max(self.group.length)
        x_bld = x_bld + self.position[places_of]
        for layer in self.layers:
            x_bld = layer(x_bld, there)
        flat = self.embed.flat(numeric_bn, self.embed(numeric_bn, emb_bfd))
        if not self.concat:
            return label_logits(self.mlp(torch.cat([flat, x_bld[:, 0]], 1)))
        # As many places for every batch, and zeros where a row has no event.
        at = torch.arange(self.group.length + 1, device=x_bld.device)
        states = x_bld[:, at.clamp_max(x_bld.shape[1] - 1)] * (at <= of.offsets.diff().unsqueeze(1)).unsqueeze(2)
        return label_logits(self.mlp(torch.cat([flat, states.flatten(1)], 1)))


class EncoderLayer(nn.Module):
    """s = LN(x + dropout(W_o MultiHead(x))),  LN(s + dropout(W_2 leaky_relu(W_1 s)))   (eqs. 1 to 5)"""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        # Without biases, as in the paper: that of keys moves no weight of the softmax, its gradient is rounding noise.
        self.qkv, self.output = linear(width, 3 * width, bias=False), linear(width, width)
        self.first, self.second = linear(width, feed_forward), linear(feed_forward, width)
        self.of_attention, self.of_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop_attention, self.drop_feed_forward = Dropout(dropout), Dropout(dropout)

    def forward(self, x_bld: Tensor, there_bl: Tensor) -> Tensor:
        """Map tokens [B, L, width] to the same; those that are not there are seen by none."""
        q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in self.qkv(x_bld).chunk(3, 2))
        seen = F.scaled_dot_product_attention(q, k, v, there_bl[:, None, None])
        attended = self.output(seen.transpose(1, 2).flatten(2))
        s_bld = self.of_attention(x_bld + self.drop_attention(attended))
        fed = self.second(F.leaky_relu(self.first(s_bld)))
        return self.of_feed_forward(s_bld + self.drop_feed_forward(fed))


def newest_first(places: Padded) -> Padded:
    """Return places whose first event is the newest one, so that places count from it whatever a row's length."""
    at = torch.arange(places.mask.shape[1], device=places.mask.device)
    index = places.offsets[1:].unsqueeze(1) - 1 - at
    return Padded(torch.where(places.mask, index, 0), places.mask, places.offsets)
