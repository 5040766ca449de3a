"""FinalNet (Zhu et al., SIGIR 2023, "FINAL: factorized interaction layer for CTR prediction")."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.dropout import Dropout
from tessera.ctr.models.layers import FieldEmbedding, label_logits, linear
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

RESIDUALS = ("concat", "sum")


class FinalNet(Tower):
    """z = (z_1 + z_2) / 2 of two stacks of factorized interaction layers;  y = sigmoid(z)

    A layer multiplies two linear maps of its input, so that the order of interactions doubles with each:
    [W_2 x, W_1 x * W_2 x] (concat) or W_2 x + W_1 x * W_2 x (sum), then batch norm, ReLU, dropout. The first stack
    reads the fields' vectors and what a linear gate over the fields makes of them.

    L = BCE(z; y) + BCE(z_1; p) + BCE(z_2; p) with p = sigmoid(z) held fixed: each stack learns from both together.
    Without a second stack (`hidden2` empty, 1B) z = z_1 and L is plain. Of several labels each has this loss, with
    logits of its own over the same stacks.
    """

    has_heads = True
    branch_loss = "agreement"

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        hidden1: Sequence[int],
        hidden2: Sequence[int],
        residual: str,
        dropout1: float,
        dropout2: float,
        *,
        gate: bool,
        relu: bool,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        if residual not in RESIDUALS:
            raise ConfigError(f"model.residual is {residual!r}; expected {' or '.join(RESIDUALS)}")
        for key, hidden in (("hidden1", hidden1), ("hidden2", hidden2)):
            if residual == "concat" and any(width % 2 for width in hidden):
                raise ConfigError(f"model.{key} is {list(hidden)}; expected even widths with model.residual=concat")
        if not hidden1:
            raise ConfigError("model.hidden1 is empty; expected the widths of the first stack, for example [400, 400]")
        self.embedding_dims = {"v": embedding_dim}
        self.embed = FieldEmbedding(fields, embedding_dim)
        count, inputs = self.embed.count, self.embed.inputs
        self.gate = linear(count, count) if gate and count else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)
        wide = inputs + (count * embedding_dim if self.gate is not None else 0)
        stack = partial(_stack, residual=residual, relu=relu, batch_norm=batch_norm)
        self.first = stack(wide, hidden1, dropout1, "model.dropout1")
        self.second = stack(inputs, hidden2, dropout2, "model.dropout2") if hidden2 else None
        self.first_output = linear(hidden1[-1], fields.outputs)
        self.second_output = linear(hidden2[-1], fields.outputs) if hidden2 else None

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        emb_bfd = self.embed(numeric_bn, embeddings["v"])
        gated_bfd = emb_bfd
        if self.gate is not None:
            gates = self.gate(emb_bfd.transpose(1, 2)).transpose(1, 2)
            gated_bfd = torch.cat([emb_bfd, emb_bfd * gates], 1)
        first = label_logits(self.first_output(self.first(self.embed.flat(numeric_bn, gated_bfd))))
        if self.second is None or self.second_output is None:
            return first
        second = label_logits(self.second_output(self.second(self.embed.flat(numeric_bn, emb_bfd))))
        if self.training:
            self.branches = (first, second)
        return (first + second) * 0.5


class FactorizedInteraction(nn.Module):
    """[W_2 x, W_1 x * W_2 x] or, with residual sum, W_2 x + W_1 x * W_2 x: [B, inputs] -> [B, outputs]."""

    def __init__(self, inputs: int, outputs: int, residual: str) -> None:
        super().__init__()
        self.concat = residual == "concat"
        self.weight = linear(inputs, outputs if self.concat else 2 * outputs)

    def forward(self, rows: Tensor) -> Tensor:
        second, first = self.weight(rows).chunk(2, 1)
        return torch.cat([second, first * second], 1) if self.concat else torch.addcmul(second, first, second)


def _stack(
    inputs: int, hidden: Sequence[int], dropout: float, key: str, *, residual: str, relu: bool, batch_norm: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(FactorizedInteraction(inputs, width, residual))
        if batch_norm:
            layers.append(BatchNorm(width))
        if relu:
            layers.append(nn.ReLU())
        layers.append(Dropout(dropout, key))
        inputs = width
    return nn.Sequential(*layers)
