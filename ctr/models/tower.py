"""Define the interface of a model: embedded fields in, one logit out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from tessera.ctr.models.numeric import ScaledVectors


@dataclass(frozen=True)
class Fields:
    """The fields a tower sees, in the order of its input tensors, and how numeric ones become vectors.

    `embed_numeric(fields, dim)` makes a module [B, fields] -> [B, fields, dim]; the configuration's `numeric` chooses.
    """

    numeric: tuple[str, ...]
    ids: tuple[str, ...]
    embed_numeric: Callable[[int, int], nn.Module] = ScaledVectors

    def __len__(self) -> int:
        return len(self.numeric) + len(self.ids)


class Tower(nn.Module):
    """Base of every model. `embedding_dims` names the groups of embeddings it wants for each id field, with dims."""

    embedding_dims: dict[str, int]

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        """Return logits [B]. numeric_bn: [B, numeric fields] float32; embeddings: group -> [B, id fields, dim]."""
        raise NotImplementedError
