"""EDCN, the enhanced deep and cross network (Chen et al., CIKM 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.dcn import RankOneCross
from tessera.ctr.models.dropout import Dropout
from tessera.ctr.models.layers import FieldEmbedding, label_logits, linear, need_pairs, need_positive
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

BRIDGES = ("product", "sum", "concat")


class EDCN(Tower):
    """A cross network and a deep one of the same width, joined after each layer by a bridge and told apart before each
    layer by regulation:

    c_l, d_l = regulate_l(b_{l-1});  c'_l = c_0 <w_l, c_l> + b_l + c_l,  d'_l = ReLU(W_l d_l + a_l);
    b_l = bridge(c'_l, d'_l);  y = sigmoid(w^T [c'_L, d'_L, b_L])

    b_0 are the embeddings. The residual of a cross layer, DCN's, is its regulated input; FuxiCTR's code has none.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        layers: int,
        bridge: str,
        temperature: float,
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        if bridge not in BRIDGES:
            raise ConfigError(f"model.bridge is {bridge!r}; expected {', '.join(BRIDGES)}")
        need_positive(layers=layers)
        if temperature <= 0:
            raise ConfigError(f"model.temperature is {temperature}; expected a number above 0")
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("EDCN", self.embed.count)
        inputs = self.embed.inputs
        widths = [embedding_dim] * self.embed.count + [1] * (inputs - self.embed.count * embedding_dim)
        self.regulate = nn.ModuleList(Regulation(widths, temperature, batch_norm=batch_norm) for _ in range(layers))
        self.cross = nn.ModuleList(RankOneCross(inputs) for _ in range(layers))
        self.deep = nn.ModuleList(linear(inputs, inputs) for _ in range(layers))
        self.dropout = nn.ModuleList(Dropout(dropout) for _ in range(layers))
        self.bridge = bridge
        self.join = nn.ModuleList(linear(2 * inputs, inputs) for _ in range(layers)) if bridge == "concat" else None
        self.output = linear(3 * inputs, fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        joined = self.embed.flat(numeric_bn, self.embed(numeric_bn, embeddings["v"]))
        first = crossed = deep = joined
        for number, regulate in enumerate(self.regulate):
            crossed, deep = regulate(joined)
            if number == 0:
                first = crossed
            crossed = self.cross[number](first, crossed) + crossed
            deep = self.dropout[number](self.deep[number](deep).relu())
            joined = self._joined(number, crossed, deep)
        return label_logits(self.output(torch.cat([crossed, deep, joined], 1)))

    def _joined(self, number: int, crossed: Tensor, deep: Tensor) -> Tensor:
        if self.join is not None:
            return self.join[number](torch.cat([crossed, deep], 1)).relu()
        return crossed * deep if self.bridge == "product" else crossed + deep


class Regulation(nn.Module):
    """g * x for each of both networks, g the softmax of a learned number per field over a temperature: [B, inputs] ->
    two of [B, inputs]. widths: of each field in x."""

    place: Tensor

    def __init__(self, widths: list[int], temperature: float, *, batch_norm: bool) -> None:
        super().__init__()
        self.temperature = temperature
        self.scores = nn.Parameter(torch.ones(2, len(widths)))
        place = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
        self.register_buffer("place", place, persistent=False)
        self.norms = nn.ModuleList(BatchNorm(sum(widths)) if batch_norm else nn.Identity() for _ in range(2))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        gate_2i = torch.softmax(self.scores / self.temperature, 1).index_select(1, self.place)
        crossed, deep = (norm(rows * gate) for norm, gate in zip(self.norms, gate_2i.unbind(0), strict=True))
        return crossed, deep
