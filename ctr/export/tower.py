"""The tower of a model as a graph of its own, by torch.export: what serving and C++ run without the model's code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tessera.ctr.data.schema import Schema
from tessera.ctr.models.tower import Tower
from tessera.embedding.errors import ConfigError

EXAMPLE_ROWS = 3  # traced with; another number would do, but 0 and 1, which torch.export takes for constants
MOST_ROWS = 1 << 24  # of a batch


class ServedTower(nn.Module):
    """Numeric values and one tensor per group of embeddings -> logits, float32, as evaluation computes them.

    amp: the tower runs in bfloat16, as in training with `trainer.amp`.
    """

    def __init__(self, tower: Tower, *, amp: bool) -> None:
        super().__init__()
        self.tower, self.amp = tower, amp
        self.groups = list(tower.embedding_dims)

    def forward(self, numeric_bn: Tensor, *embeddings: Tensor) -> Tensor:
        """Return logits [B], or [B, labels]. numeric_bn: [B, numeric fields]; embeddings: [B, id fields, dim] each."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            logits = self.tower(numeric_bn, dict(zip(self.groups, embeddings, strict=True)))
        return logits.float()


def inputs_of(dims: Mapping[str, int], numeric: int, ids: int, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random inputs of a tower: numeric values, then each group's embeddings."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = [torch.randn(rows, ids, dim, generator=draw) for dim in dims.values()]
    return torch.randn(rows, numeric, generator=draw), *embeddings


def check_features(schema: Schema) -> None:
    """Raise ConfigError for features that exports do not have: sequences whose events the model sees one by one."""
    for group in schema.sequences.values():
        raise ConfigError(
            f"an export has pooled features alone, and feature {group[0].name!r} has pooling: none; "
            "score with tessera score"
        )


@torch.no_grad()
def graph_of(served: ServedTower, numeric: int, ids: int) -> torch.export.ExportedProgram:
    """Return the graph of a tower for any number of rows.

    Raises ConfigError, one line: torch.export cannot trace it; it says why.
    """
    served = served.cpu().eval()
    inputs = inputs_of(served.tower.embedding_dims, numeric, ids, EXAMPLE_ROWS)
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    shapes = ({0: rows}, tuple({0: rows} for _ in inputs[1:]))
    try:
        return torch.export.export(served, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of many kinds, from inside of torch
        kind = type(served.tower).__name__
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"model {kind} cannot be exported: torch.export says: {reason[:300]}") from None


@torch.no_grad()
def largest_difference(served: ServedTower, module: Any, numeric: int, ids: int) -> float:
    """Return how far the logits of a graph, as a module, lie from those of its tower, at most, on random rows: 1, 2 and
    300."""
    largest = 0.0
    for rows in (1, 2, 300):
        inputs = inputs_of(served.tower.embedding_dims, numeric, ids, rows, seed=rows)
        largest = max(largest, float((module(*inputs) - served(*inputs)).abs().max()))
    return largest
