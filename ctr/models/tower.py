"""Define the interface of a model: embedded fields in, one logit per label out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tessera.ctr.data.labels import Label
from tessera.ctr.models.numeric import ScaledVectors


@dataclass(frozen=True)
class Fields:
    """The fields a tower sees, in the order of its input tensors, how numeric ones become vectors, and its labels.

    labels: one is one task. outputs: units of the tower's last layer; as many as labels, but for a tower that is a part
    of another one, an expert say.
    `embed_numeric(fields, dim)` makes a module [B, fields] -> [B, fields, dim]; the configuration's `numeric` chooses.
    """

    numeric: tuple[str, ...]
    ids: tuple[str, ...]
    embed_numeric: Callable[[int, int], nn.Module] = ScaledVectors
    labels: tuple[Label, ...] = (Label(),)
    outputs: int = 1

    def __len__(self) -> int:
        return len(self.numeric) + len(self.ids)


class Tower(nn.Module):
    """Base of every model.

    Attributes:
        embedding_dims: the groups of embeddings that it wants for each id field, with their dims.
        has_heads: it answers as many logits as `Fields.outputs` says; others are refused where there is more than one.
        trains_joint: labels with a space (`where`) are trained by their joint probability, over all rows.
        is_nested: a row where a label is 1 and its space is 0 is a bad one.
        loss_weights: of the labels, beside those of the schema; None: 1 each.
    """

    embedding_dims: dict[str, int]
    has_heads: bool = False
    trains_joint: ClassVar[bool] = False
    is_nested: ClassVar[bool] = False
    loss_weights: tuple[float, ...] | None = None

    def forward(self, numeric_bn: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        """Return logits: [B], or [B, outputs] where there are several; that of a label in its own space.

        numeric_bn: [B, numeric fields] float32; embeddings: group -> [B, id fields, dim].
        """
        raise NotImplementedError

    def gates(self) -> dict[str, Tensor]:
        """Return the mean gate of each mixture of experts over the last batch, float [experts] by name, for the log."""
        return {}
