"""Progressive layered extraction (Tang et al., RecSys 2020); one layer of it is customized gate control (CGC)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tessera.ctr.models.experts import Gate, Gates, Heads, check_count, check_widths, named_gates, perceptron
from tessera.ctr.models.layers import FieldEmbedding
from tessera.ctr.models.tower import Fields, Tower
from tessera.embedding.errors import ConfigError

SHARED_GATES = ("all", "shared")


class PLE(Tower):
    """h_t = sum over [S_t; C] of softmax(gate_t(x_t)) * expert, by layers: x_t <- h_t;  z_t = head_t(h_t)

    S_t are `own` experts of a label on x_t, C the `shared` ones on x_c. Before the last layer x_c <- h_c, a mixture of
    all experts of the layer (`shared_gate: all`, section 4.2 of the paper) or of C alone (`shared`, as public code has
    it).
    """

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        layers: int,
        own: int,
        shared: int,
        expert: Sequence[int],
        gate: Sequence[int],
        shared_gate: str,
        head: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        check_count("model.layers", layers)
        check_count("model.own", own, 0)
        check_count("model.shared", shared)
        check_widths("model.expert", expert)
        if shared_gate not in SHARED_GATES:
            raise ConfigError(f"model.shared_gate is {shared_gate!r}; expected all or shared")
        self.embedding_dims = {"v": embedding_dim}
        self.fields = fields
        self.embed = FieldEmbedding(fields, embedding_dim, side_by_side=True)
        extraction, inputs = [], self.embed.inputs
        for layer in range(layers):
            nets = _Nets(inputs, expert, dropout, batch_norm=batch_norm)
            passes = None if layer == layers - 1 else shared_gate
            extraction.append(Extraction(nets, len(fields.labels), own, shared, gate, passes))
            inputs = expert[-1]
        self.extraction = nn.ModuleList(extraction)
        self.heads = Heads(len(fields.labels), inputs, head, dropout, batch_norm=batch_norm)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        flat = self.embed.flat(numeric_bn, self.embed(numeric_bn, embeddings["v"]))
        states = [flat] * (len(self.fields.labels) + 1)  # the last is the shared one
        for layer in self.extraction:
            states = layer(states)
        return self.heads(states[: len(self.fields.labels)])

    def gates(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, layer in enumerate(self.extraction):
            assert isinstance(layer, Extraction)
            prefix = f"{number}." if len(self.extraction) > 1 else ""
            found |= named_gates(self.fields, layer.gates, prefix)
            if layer.shared_gate is not None:
                found[f"{prefix}shared"] = layer.shared_gate.mean
        return found


class _Nets:
    """Makes experts of one layer."""

    def __init__(self, inputs: int, hidden: Sequence[int], dropout: float, *, batch_norm: bool) -> None:
        self.inputs, self.hidden, self.dropout, self.batch_norm = inputs, hidden, dropout, batch_norm

    def make(self, count: int) -> nn.ModuleList:
        return nn.ModuleList(
            perceptron(self.inputs, self.hidden, self.dropout, batch_norm=self.batch_norm) for _ in range(count)
        )


class Extraction(nn.Module):
    """One layer: T + 1 states, those of the labels and the shared one, to as many.

    passes: what the shared gate mixes (`all` or `shared`); None: the last layer, which has no shared output.
    """

    def __init__(
        self, nets: _Nets, labels: int, own: int, shared: int, gate: Sequence[int], passes: str | None
    ) -> None:
        super().__init__()
        self.own = nn.ModuleList(nets.make(own) for _ in range(labels))
        self.shared = nets.make(shared)
        self.gates = Gates(Gate(nets.inputs, gate, own + shared) for _ in range(labels))
        self.mixes_all = passes == "all"
        mixed = shared + own * labels * self.mixes_all
        self.shared_gate = None if passes is None else Gate(nets.inputs, gate, mixed)

    def forward(self, states: list[Tensor]) -> list[Tensor]:
        *of_labels, common = states
        shared = [net(common) for net in self.shared]
        own = [
            [net(state) for net in cast(nn.ModuleList, nets)] for nets, state in zip(self.own, of_labels, strict=True)
        ]
        mixed = [
            gate.mixed(state, torch.stack(experts + shared, 1))
            for gate, state, experts in zip(self.gates, of_labels, own, strict=True)
        ]
        if self.shared_gate is None:
            return [*mixed, common]
        experts = [one for of_label in own for one in of_label] * self.mixes_all + shared
        return [*mixed, self.shared_gate.mixed(common, torch.stack(experts, 1))]
