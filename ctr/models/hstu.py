"""HSTU as a ranking model, in the shape of MLPerf training v6.1's recommendation benchmark (Zhai et al., ICML 2024,
arXiv 2402.17152; its DLRM form is that of the authors' code for ranking)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.models.dropout import Dropout
from tessera.ctr.models.hstu_attention import HSTUAttention
from tessera.ctr.models.layers import FieldEmbedding, label_logits, linear, need_positive
from tessera.ctr.models.sequences import EventVectors, one_group, row_of_events
from tessera.ctr.models.tower import Events, Fields, SequenceTower
from tessera.embedding.errors import ConfigError
from tessera.kernels.mix import mix64

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
FORMS = ("dlrm", "research")


class HSTU(SequenceTower):
    """The tokens of a row are its contextual fields (all but the target's), its events, oldest first, and its target:

    x     = sqrt(d) * MLP(embeddings of the token side by side) + position     (position: counted from the newest event)
    x     = layer_n(.. layer_1(dropout(x)))     (`HSTULayer`)
    y     = Linear(swish_norm(Linear(LN(x_target) * MLP'(target))))

    MLP' is not that of the tokens: one that is both the query of the layers and the factor of the head learns slowly.
    Every layer divides by the configured number of tokens, never by that of the batch. The target's action and age are
    unknown: zeros in their place.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        width: int,
        layers: int,
        heads: int,
        qk_dim: int,
        v_dim: int,
        preprocessor: int,
        head_hidden: int,
        input_dropout: float,
        dropout: float,
        form: str,
        *,
        token_norm: bool,
    ) -> None:
        super().__init__()
        need_positive(width=width, layers=layers, heads=heads, qk_dim=qk_dim, v_dim=v_dim)
        need_positive(preprocessor=preprocessor, head_hidden=head_hidden)
        if form not in FORMS:
            raise ConfigError(f"model.form is {form!r}; expected one of {', '.join(FORMS)}")
        self.embedding_dims = {"v": embedding_dim}
        self.group, self.width = one_group("HSTU", fields), width
        self.embed = FieldEmbedding(fields, embedding_dim)
        self.vectors = EventVectors(self.group, embedding_dim)
        first = self.embed.count - len(fields.ids)  # numeric fields stand before the ids
        own = {first + place for place in self.vectors.fields}
        self.contextual = [place for place in range(self.embed.count) if place not in own]
        self.longest = len(self.contextual) + self.group.length + 1
        self.of_event = Preprocessor(self.vectors.width, preprocessor, width, norm=token_norm)
        self.of_field = Preprocessor(embedding_dim, preprocessor, width, norm=token_norm) if self.contextual else None
        self.of_item = Preprocessor(self.vectors.width, head_hidden, width, norm=token_norm)
        self.position = nn.Parameter(torch.randn(self.longest, width) * 0.02)
        self.dropout = Dropout(input_dropout, "model.input_dropout")
        self.layers = nn.ModuleList(HSTULayer(width, heads, qk_dim, v_dim, dropout, form) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        raw = fields.columns if self.embed.raw else 0
        self.head = nn.Sequential(
            linear(width + raw, head_hidden), SwishNorm(head_hidden), linear(head_hidden, fields.outputs)
        )

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor], events: dict[str, Events]) -> Tensor:
        """Return logits, [B] or of several labels [B, outputs]."""
        candidates = embeddings["v"].unsqueeze(1)
        return self.of_candidates(numeric_bn, embeddings, events, candidates).squeeze(1)

    def of_candidates(
        self, numeric_bn: Tensor, embeddings: dict[str, Tensor], events: dict[str, Events], candidates_bcfd: Tensor
    ) -> Tensor:
        """Return logits of C candidates of each row, [B, C] or of several labels [B, C, outputs], each as if it were
        the only target: they see the context and the events, which are computed once, and never each other.

        candidates_bcfd: [B, C, id fields, dim], embeddings of the group "v" of each candidate; the fields of the target
        alone are read, all others are those of the row. Meant for scoring: dropout drops the same units of all.
        """
        of, emb_bfd, (rows, count) = events[self.group.name], embeddings["v"], candidates_bcfd.shape[:2]
        items = self.vectors.target(candidates_bcfd.flatten(0, 1))  # [B * C, width of an event]
        targets, events_nd = self.of_event(items), self.of_event(self.vectors.events(of))
        fields_bpd = self.embed(numeric_bn, emb_bfd)[:, self.contextual]
        context = (
            fields_bpd.new_zeros(0, self.width) if self.of_field is None else self.of_field(fields_bpd.flatten(0, 1))
        )
        prefix = len(self.contextual)
        longest = (self.longest if of.longest is None else prefix + of.longest + 1) + count - 1
        tokens = Tokens(of.offsets, prefix, self.group.length, count, events_nd.shape[0])
        x_td = tokens.in_order(context.to(targets.dtype), events_nd, targets) * math.sqrt(self.width)
        x_td = dropped(self.dropout, x_td + self.position[tokens.position], tokens)
        # The divisor is that of one target, however many there are.
        attend = HSTUAttention(tokens.offsets, prefix, count, longest, float(self.longest))
        for layer in self.layers:
            x_td = layer(x_td, attend, tokens)
        merged = self.norm(x_td[tokens.of_targets]) * self.of_item(items)
        if self.embed.raw:
            merged = torch.cat([merged, numeric_bn.repeat_interleave(count, 0)], 1)
        return label_logits(self.head(merged)).unflatten(0, (rows, count))


class Tokens:
    """The tokens of a batch, T in all, row after row: `prefix` contextual ones, the row's events, `targets` targets.

    Attributes:
        offsets: int64 [B + 1] of each row's tokens.
        row: int64 [T], the row of each token.
        position: int64 [T], which does not depend on the length of the row: 0 for targets, 1 for the newest event
            and so on to `length` for the oldest that may be, then those of the prefix.
        of_targets: int64 [B * targets], the tokens of the targets.
    """

    def __init__(self, of_events: Tensor, prefix: int, length: int, targets: int, events: int) -> None:
        rows, device = of_events.shape[0] - 1, of_events.device
        each = torch.arange(rows + 1, device=device)
        self.offsets = of_events + each * (prefix + targets)
        count = events + rows * (prefix + targets)
        self.row = row_of_events(self.offsets, count)
        behind = self.offsets[self.row + 1] - 1 - torch.arange(count, device=device)  # tokens behind this one
        at = torch.arange(count, device=device) - self.offsets[self.row]
        is_target, place = behind < targets, targets - 1 - behind
        self.position = torch.where(at < prefix, length + 1 + at, (behind - targets + 1).clamp_min(0))
        self.of_targets = (self.offsets[1:, None] - targets + torch.arange(targets, device=device)).flatten()
        # Where each token stands in (prefixes, events, targets), laid one behind the other.
        of_prefix = self.row * prefix + at
        of_event = rows * prefix + of_events[self.row] + at - prefix
        of_target = rows * prefix + events + self.row * targets + place
        self._source = torch.where(at < prefix, of_prefix, torch.where(is_target, of_target, of_event))

    def in_order(self, prefix: Tensor, events: Tensor, targets: Tensor) -> Tensor:
        """Return [T, d] of prefixes [B * prefix, d], events [N, d] and targets [B * targets, d]."""
        return torch.cat([prefix, events, targets])[self._source]


class HSTULayer(nn.Module):
    """[U, V, Q, K] = LN(x) W (+ b),  A = SiLU(alpha Q K^T) / divisor * mask,  Y = LN(A V)

    dlrm:      bias, SiLU on U alone, alpha = 1 / sqrt(d_qk);   x + W_o dropout([U, A V, U * Y])
    research:  no bias, SiLU on all four, alpha = 1;            x + W_o dropout(U * Y)
    """

    def __init__(self, width: int, heads: int, qk_dim: int, v_dim: int, dropout: float, form: str) -> None:
        super().__init__()
        self.heads, self.sizes = heads, [heads * v_dim, heads * v_dim, heads * qk_dim, heads * qk_dim]
        self.is_dlrm = form == "dlrm"
        self.alpha = qk_dim**-0.5 if self.is_dlrm else 1.0
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(heads * v_dim)
        self.uvqk = linear(width, sum(self.sizes), bias=self.is_dlrm)
        self.output = linear(heads * v_dim * (3 if self.is_dlrm else 1), width, bias=self.is_dlrm)
        self.dropout = Dropout(dropout)

    def forward(self, x_td: Tensor, attend: HSTUAttention, tokens: Tokens) -> Tensor:
        """Map the batch's tokens [T, width] to the same."""
        mixed = self.uvqk(self.before(x_td))
        if self.is_dlrm:
            u, v, q, k = mixed.split(self.sizes, 1)
            u = F.silu(u)
        else:
            u, v, q, k = F.silu(mixed).split(self.sizes, 1)
        q, k, v = (one.unflatten(1, (self.heads, -1)) for one in (q, k, v))
        seen = attend(q, k, v, self.alpha).flatten(1)
        gated = u * self.after(seen).to(u.dtype)
        gated = torch.cat([u, seen, gated], 1) if self.is_dlrm else gated
        return x_td + self.output(dropped(self.dropout, gated, tokens))


class SwishNorm(nn.Module):
    """x * sigmoid(LN(x)), "Swish-LayerNorm"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, width] to the same."""
        return x * torch.sigmoid(self.norm(x))


class Preprocessor(nn.Sequential):
    """Linear, Swish-LayerNorm, linear and, with `norm`, LayerNorm: what a token's embeddings go through.

    The authors' code has the norm. Rows of tables begin near 0, and it makes tokens of full size of what is noise then,
    so that small data take longer to be learnt.
    """

    def __init__(self, inputs: int, hidden: int, width: int, *, norm: bool) -> None:
        super().__init__(linear(inputs, hidden), SwishNorm(hidden), linear(hidden, width))
        if norm:
            self.append(nn.LayerNorm(width))


def dropped(dropout: Dropout, x_td: Tensor, tokens: Tokens) -> Tensor:
    """Return tokens with units dropped; masks are drawn by the token's row and its position in it."""
    keys = dropout.keys
    if keys is None or not dropout.training or not dropout.p:
        return dropout(x_td)
    return dropout(x_td, mix64(keys[tokens.row] + tokens.position * GOLDEN))
