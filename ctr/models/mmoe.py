"""Multi-gate mixture of experts (Ma et al., KDD 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tessera.ctr.models.experts import Experts, Gate, Gates, Heads, named_gates
from tessera.ctr.models.tower import Fields, Tower


class MMoE(Tower):
    """E_k = expert_k(x);  h_t = sum_k softmax(gate_t(x))_k E_k;  z_t = head_t(h_t)   (eqs. 5 to 7)"""

    has_heads = True

    def __init__(
        self,
        fields: Fields,
        embedding_dim: int,
        experts: int,
        expert: Sequence[int],
        gate: Sequence[int],
        head: Sequence[int],
        dropout: float,
        *,
        batch_norm: bool,
        body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.experts = Experts(
            fields, embedding_dim, experts, expert, dropout, batch_norm=batch_norm, body=body, is_gated=True
        )
        self.embedding_dims = self.experts.embedding_dims
        self.fields = fields
        self.gate = Gates(Gate(self.experts.inputs, gate, experts) for _ in fields.labels)
        self.heads = Heads(len(fields.labels), self.experts.width, head, dropout, batch_norm=batch_norm)

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        outputs_bkw, flat = self.experts(numeric_bn, embeddings)
        return self.heads([gate.mixed(flat, outputs_bkw) for gate in self.gate])

    def gates(self) -> dict[str, Tensor]:
        return named_gates(self.fields, self.gate)
