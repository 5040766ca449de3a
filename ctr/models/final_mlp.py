"""FinalMLP (Mao et al., AAAI 2023, arXiv 2304.00902)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, linear
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError, did_you_mean


class FinalMLP(Tower):
    """Two MLPs on differently gated embeddings, fused bilinearly per head:

    g_s = 2 sigmoid(gate_s(context_s)),  o_s = MLP_s(g_s * concat_i e_i)   for the streams s = 1, 2   (eqs. 4, 5)
    y = sigmoid(b + w_1^T o_1 + w_2^T o_2 + sum_h o_1h^T W_h o_2h)   (eqs. 6 to 8)

    The context of a gate is the embeddings of the fields that `gate1_fields`, `gate2_fields` name, or a learned
    vector where they name none.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        hidden1: Sequence[int],
        hidden2: Sequence[int],
        heads: int,
        gate_hidden: Sequence[int],
        gate1_fields: Sequence[str],
        gate2_fields: Sequence[str],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        names = fields.ids if self.embed.raw else (*fields.numeric, *fields.vectors, *fields.ids)
        inputs = self.embed.inputs
        self.gate1 = Gate("gate1_fields", gate1_fields, names, embedding_dim, gate_hidden, inputs)
        self.gate2 = Gate("gate2_fields", gate2_fields, names, embedding_dim, gate_hidden, inputs)
        self.mlp1 = MLP(inputs, hidden1, dropout, batch_norm=batch_norm, outputs=None)
        self.mlp2 = MLP(inputs, hidden2, dropout, batch_norm=batch_norm, outputs=None)
        self.fusion = BilinearFusion(self.mlp1.width, self.mlp2.width, heads, fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        flat = self.embed.flat(numeric_bn, emb_bfd)
        return self.fusion(self.mlp1(self.gate1(emb_bfd) * flat), self.mlp2(self.gate2(emb_bfd) * flat))


class Gate(nn.Module):
    """2 sigmoid(MLP(context)): [B, F, D] -> [B, outputs], or [1, outputs] where the context is a learned vector."""

    def __init__(
        self, key: str, wanted: Sequence[str], names: Sequence[str], dim: int, hidden: Sequence[int], outputs: int
    ) -> None:
        super().__init__()
        for name in wanted:
            if name not in names:
                hint = did_you_mean(name, names)
                raise ConfigError(f"model.{key} names {name!r}, which is no embedded field{hint}")
        self.fields = [names.index(name) for name in wanted]
        self.context = None if wanted else nn.Parameter(torch.zeros(1, dim))
        self.mlp = MLP(max(1, len(wanted)) * dim, hidden, outputs=outputs)

    def forward(self, emb_bfd: Tensor) -> Tensor:
        context = emb_bfd[:, self.fields].flatten(1) if self.context is None else self.context
        return 2 * torch.sigmoid(self.mlp(context))


class BilinearFusion(nn.Module):
    """b + w_1^T x + w_2^T y + sum_h x_h^T W_h y_h, the vectors cut into `heads` parts: [B, X], [B, Y] -> [B], or with
    b, w and W for each of several outputs -> [B, outputs]."""

    def __init__(self, first: int, second: int, heads: int, outputs: int) -> None:
        super().__init__()
        if heads < 1 or first % heads or second % heads:
            raise ConfigError(
                f"model.heads is {heads}; expected a divisor of the last widths of hidden1 and hidden2, "
                f"{first} and {second}"
            )
        self.heads, self.outputs = heads, outputs
        self.first, self.second = linear(first, outputs), linear(second, outputs, bias=False)
        self.weight = nn.Parameter(torch.empty(heads, first // heads, outputs * (second // heads)))
        bound = (6 / (first // heads * (second // heads) * heads + 1)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        first_hbx = first.unflatten(1, (self.heads, -1)).transpose(0, 1)
        second_bhy = second.unflatten(1, (self.heads, -1))
        product_bhy = torch.bmm(first_hbx, self.weight).transpose(0, 1)
        linear_bt = self.first(first) + self.second(second)
        if self.outputs == 1:
            return linear_bt.squeeze(1) + (product_bhy * second_bhy).sum((1, 2))
        product_bhty = product_bhy.unflatten(2, (self.outputs, -1))
        return linear_bt + (product_bhty * second_bhy.unsqueeze(2)).sum((1, 3))
