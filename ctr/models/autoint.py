"""AutoInt and AutoInt+ (Song et al., CIKM 2019, arXiv 1810.11921; authors' code featureRec/autoint)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.models.dropout import Dropout
from tessera.ctr.models.layers import MLP, FieldEmbedding, FirstOrder, in_pieces, label_logits, linear, need_pairs
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

FORMS = ("paper", "code")
NORMS = ("none", "before_relu", "after_relu")


class AutoInt(Tower):
    """y = sigmoid(w^T concat_m(out_m) + b), out by a stack of interacting layers over the fields   (section 4)

    AutoInt+ adds the logit of an MLP on the concatenated embeddings: `hidden` not empty. `wide` adds w0 + <w, x>.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        layers: int,
        heads: int,
        attention_dim: int,
        form: str,
        *,
        residual: bool | str,
        attention_dropout: float,
        hidden: Sequence[int],
        dropout: float,
        batch_norm: bool,
        scale: bool | None = None,
        layer_norm: str | None = None,
        wide: bool = False,
    ) -> None:
        super().__init__()
        _check(layers, heads, attention_dim, form, residual=residual, layer_norm=layer_norm)
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("AutoInt", self.embed.count)
        widths = [embedding_dim] + [attention_dim] * (layers - 1)
        self.interact = nn.ModuleList(
            InteractingLayer(
                width,
                attention_dim,
                heads,
                form,
                residual=residual,
                dropout=attention_dropout,
                scale=scale,
                layer_norm=layer_norm,
            )
            for width in widths
        )
        raw = self.embed.inputs - self.embed.count * embedding_dim
        self.output = linear(self.embed.count * attention_dim + raw, fields.outputs)
        self.mlp = (
            MLP(self.embed.inputs, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs) if hidden else None
        )
        self.first_order = FirstOrder(fields) if wide else None
        if wide:
            self.embedding_dims["w"] = fields.outputs

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        first = self.interact[0]
        assert isinstance(first, InteractingLayer)
        mixed_bfa = in_pieces(self._interacted, emb_bfd, first.dropout.keys if self.training else None)
        logit = self.output(self.embed.flat(numeric_bn, mixed_bfa))
        if self.mlp is not None:
            logit = logit + self.mlp(self.embed.flat(numeric_bn, emb_bfd))
        logit = label_logits(logit)
        return logit if self.first_order is None else logit + self.first_order(numeric_bn, embeddings["w"])

    def _interacted(self, emb_bfd: Tensor, keys: Tensor | None = None) -> Tensor:
        for layer in self.interact:
            emb_bfd = layer(emb_bfd, keys)
        return emb_bfd


class InteractingLayer(nn.Module):
    """Multi-head self-attention over a row's fields, residual and ReLU   (eqs. 5 to 8)

    form paper: Q, K, V and residual are bare matrices, scores are not scaled.
    form code:  each is linear, bias, ReLU; scores are divided by sqrt(width of a head); layer norm after the ReLU.

    `scale` and `layer_norm`, where they are set, say otherwise than the form. residual identity: the input itself where
    its width is the layer's, as in much public code; else, and true, a projection of it.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        heads: int,
        form: str,
        *,
        residual: bool | str,
        dropout: float,
        scale: bool | None = None,
        layer_norm: str | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.code = heads, form == "code"
        self.dropout = Dropout(dropout, "model.attention_dropout")
        self.scale = (width // heads) ** -0.5 if (self.code if scale is None else scale) else 1.0
        self.keeps = residual == "identity" and inputs == width
        # Query, key, value and residual in one product.
        projects = bool(residual) and not self.keeps
        self.project = nn.Linear(inputs, (4 if projects else 3) * width, bias=self.code)
        if layer_norm is None:
            layer_norm = "after_relu" if self.code else "none"
        self.norm_first = layer_norm == "before_relu"
        eps = 1e-5 if self.norm_first else 1e-8
        self.norm = nn.Identity() if layer_norm == "none" else nn.LayerNorm(width, eps=eps)
        for part in self.project.weight.split(width):
            nn.init.xavier_normal_(part)
        if self.code:
            nn.init.zeros_(self.project.bias)
        self.width = width

    def forward(self, emb_bfd: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, F, inputs] -> [B, F, width]. keys: int64 [B], what each row's dropout is drawn by."""
        projected = self.project(emb_bfd)
        if self.code:
            projected = projected.relu()
        drops = self.training and self.dropout.p > 0
        # The fused kernel of a GPU draws masks of its own.
        fused = emb_bfd.is_cuda and not drops
        mixed = self._attend_fused(projected) if fused else self._attend_by_head(projected, keys)
        if self.keeps:
            mixed = mixed + emb_bfd
        return self.norm(mixed).relu() if self.norm_first else self.norm(mixed.relu())

    def _attend_fused(self, projected: Tensor) -> Tensor:
        query, key, value, *residual = projected.split(self.width, 2)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale).transpose(1, 2).flatten(2)
        return mixed + residual[0] if residual else mixed

    def _attend_by_head(self, projected: Tensor, keys: Tensor | None) -> Tensor:
        """Do the same head by head: the CPU's fused kernel is slower over so few fields, in bfloat16 four times."""
        parts = projected.split(self.width // self.heads, 2)
        query, key, value, residual = (parts[i * self.heads : (i + 1) * self.heads] for i in range(4))
        mixed = []
        for head in range(self.heads):
            scores = torch.bmm(query[head], key[head].transpose(1, 2))
            attention = self.dropout(torch.softmax(scores * self.scale, 2), keys, head)
            if residual:
                mixed.append(torch.baddbmm(residual[head], attention, value[head]))
            else:
                mixed.append(torch.bmm(attention, value[head]))
        return torch.cat(mixed, 2)


def _check(layers: int, heads: int, width: int, form: str, *, residual: bool | str, layer_norm: str | None) -> None:
    """Raise ConfigError for settings that cannot be."""
    if form not in FORMS:
        raise ConfigError(f"model.form is {form!r}; expected {' or '.join(FORMS)}")
    if layers < 1:
        raise ConfigError(f"model.layers is {layers}; expected at least 1 interacting layer")
    if heads < 1 or width % heads:
        raise ConfigError(f"model.heads is {heads}; expected a divisor of model.attention_dim, {width}")
    if not isinstance(residual, bool) and residual != "identity":
        raise ConfigError(f"model.residual is {residual!r}; expected true, false or identity")
    if layer_norm is not None and layer_norm not in NORMS:
        raise ConfigError(f"model.layer_norm is {layer_norm!r}; expected null, {', '.join(NORMS)}")
