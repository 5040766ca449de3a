"""PIN, the product network in network (Qu et al., TOIS 2018, arXiv 1807.00311; authors' product-nets-distributed)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.models.layers import MLP, FieldEmbedding, in_pieces, label_logits, need_pairs, pairs
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

EPSILON = 1e-5  # the authors' code divides by the bare deviation


class PIN(Tower):
    """y = sigmoid(MLP(concat_{i<j} s_ij)),  s_ij = subnet_ij([e_i, e_j, e_i * e_j])

    A small net of its own per pair; each of its layers is linear and layer norm, with ReLU between layers.
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        subnet: Sequence[int],
        hidden: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        if not subnet:
            raise ConfigError("model.subnet is empty; expected the widths of a pair's layers, for example [20, 1]")
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        need_pairs("PIN", self.embed.count)
        self.subnets = PairNets(self.embed.count, embedding_dim, subnet)
        raw = self.embed.inputs - self.embed.count * embedding_dim
        self.mlp = MLP(self.subnets.outputs + raw, hidden, dropout, batch_norm=batch_norm, outputs=fields.outputs)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        pairs_bs = self.subnets(self.embed(numeric_bn, embeddings["v"]))
        if self.embed.raw:
            pairs_bs = torch.cat([pairs_bs, numeric_bn], 1)
        return label_logits(self.mlp(pairs_bs))


class PairNets(nn.Module):
    """One net per pair i < j on [e_i, e_j, e_i * e_j]; [B, F, D] -> [B, pairs * last width], pair by pair."""

    first: Tensor
    second: Tensor

    def __init__(self, fields: int, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        first, second = pairs(fields)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.outputs = len(first) * widths[-1]
        sizes = [3 * dim, *widths]
        shapes = list(zip(sizes, widths, strict=False))
        self.weights = nn.ParameterList(_uniform(len(first), inputs, outputs) for inputs, outputs in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(len(first), 1, outputs)) for _, outputs in shapes)
        self.norms = nn.ModuleList(PairNorm(len(first), outputs) for _, outputs in shapes)

    def forward(self, emb_bfd: Tensor) -> Tensor:
        return in_pieces(self._forward, emb_bfd)

    def _forward(self, emb_bfd: Tensor) -> Tensor:
        emb_fbd = emb_bfd.transpose(0, 1).contiguous()
        left_pbd, right_pbd = emb_fbd.index_select(0, self.first), emb_fbd.index_select(0, self.second)
        state_pbu = torch.cat([left_pbd, right_pbd, left_pbd * right_pbd], 2)
        for number, (weight, bias, norm) in enumerate(zip(self.weights, self.biases, self.norms, strict=True)):
            state_pbu = state_pbu.relu() if number else state_pbu
            state_pbu = norm(torch.baddbmm(bias, state_pbu, weight).transpose(0, 1)).transpose(0, 1)
        return state_pbu.transpose(0, 1).flatten(1)


class PairNorm(nn.Module):
    """Layer norm over all pairs and units of a row together; scale and shift per unit, shared by the pairs."""

    def __init__(self, pair_count: int, units: int) -> None:
        super().__init__()
        self.pair_count = pair_count
        self.scale = nn.Parameter(torch.ones(units))
        self.shift = nn.Parameter(torch.zeros(units))

    def forward(self, state_bpu: Tensor) -> Tensor:
        scale, shift = self.scale.repeat(self.pair_count), self.shift.repeat(self.pair_count)
        normed = F.layer_norm(state_bpu.flatten(1), (len(scale),), scale, shift, EPSILON)
        return normed.unflatten(1, (self.pair_count, -1))


def _uniform(pair_count: int, inputs: int, outputs: int) -> nn.Parameter:
    bound = (6 / (inputs + outputs)) ** 0.5
    return nn.Parameter(torch.empty(pair_count, inputs, outputs).uniform_(-bound, bound))
