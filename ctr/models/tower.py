"""Define the interface of a model: embedded fields and, if it reads them, sequences in, one logit per label out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from tessera.ctr.data.labels import Label
from tessera.ctr.models.numeric import ScaledVectors


@dataclass(frozen=True)
class SequenceGroup:
    """Aligned sequences, which hold the same events of a row, oldest first.

    ids: names of those that have embeddings; numbers: of those of numbers; targets: for each of ids the place among
    `Fields.ids` of the row's own field with the same table (the item whose history this is), None if there is none;
    length: events of a row at most.
    """

    name: str
    ids: tuple[str, ...]
    numbers: tuple[str, ...]
    targets: tuple[int | None, ...]
    length: int


@dataclass(frozen=True)
class Events:
    """The events of a group in a batch of B rows, N in all, row after row.

    offsets: int64 [B + 1]; embeddings: group of embeddings -> sequence -> [N, dim] float32; numbers: sequence -> [N]
    float32; longest: events of a row at most, where whoever made the batch says it (None: the layers find out).
    """

    offsets: Tensor
    embeddings: dict[str, dict[str, Tensor]]
    numbers: dict[str, Tensor]
    longest: int | None = None


@dataclass(frozen=True)
class Fields:
    """The fields a tower sees, in the order of its input tensors, how numeric ones become vectors, and its labels.

    numeric: of one number each. vectors: fields of several numbers, with how many; they stand behind the numeric fields
    and before the ids. labels: one is one task. outputs: units of the tower's last layer; as many as labels, but for a
    tower that is a part of another one, an expert say. crosses: each of ids that is a cross, with the names of the two
    features that it crosses.
    `embed_numeric(fields, dim)` makes a module [B, fields] -> [B, fields, dim]; the configuration's `numeric` chooses.
    """

    numeric: tuple[str, ...]
    ids: tuple[str, ...]
    embed_numeric: Callable[[int, int], nn.Module] = ScaledVectors
    labels: tuple[Label, ...] = (Label(),)
    outputs: int = 1
    sequences: tuple[SequenceGroup, ...] = ()
    vectors: dict[str, int] = field(default_factory=dict)
    crosses: tuple[tuple[str, str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.numeric) + len(self.vectors) + len(self.ids)

    @property
    def columns(self) -> int:
        """Width of the numeric input: one for each numeric field, then the numbers of each vector."""
        return len(self.numeric) + sum(self.vectors.values())


class Tower(nn.Module):
    """Base of every model.

    `forward(numeric_bn, embeddings)` returns logits: [B], or [B, outputs] where there are several; that of a label in
    its own space. numeric_bn: [B, fields.columns] float32; embeddings: group -> [B, id fields, dim].

    Attributes:
        embedding_dims: the groups of embeddings that it wants for each id field, with their dims.
        reads_sequences: it reads sequences with pooling none: a `SequenceTower`.
        has_heads: it answers as many logits as `Fields.outputs` says; others are refused where there is more than one.
        trains_joint: labels with a space (`where`) are trained by their joint probability, over all rows.
        is_nested: a row where a label is 1 and its space is 0 is a bad one.
        loss_weights: of the labels, beside those of the schema; None: 1 each.
        branches: logits, [B] or [B, outputs], of its parts in the last forward pass of training, where they have losses
            of their own.
        branch_loss: what these are, L_s the loss of branch s (`tessera.ctr.train.branch_loss`): worse: L_s where
            it is above that of the logit, times how far; agreement: the cross-entropy with the logit's probability,
            held fixed.
        extra_loss: of each row, [B], beside those of the labels, of the last forward pass of training; None: there is
            none.
    """

    forward: Callable[..., Tensor]
    embedding_dims: dict[str, int]
    reads_sequences: bool = False
    has_heads: bool = False
    trains_joint: ClassVar[bool] = False
    is_nested: ClassVar[bool] = False
    loss_weights: tuple[float, ...] | None = None
    branches: tuple[Tensor, ...] = ()
    branch_loss: ClassVar[str] = "none"
    extra_loss: Tensor | None = None

    def begin_step(self, step: int) -> None:
        """Take the number of the step that is trained next; for towers that change with it."""

    def gates(self) -> dict[str, Tensor]:
        """Return the mean gate of each mixture of experts over the last batch, float [experts] by name, for the log."""
        return {}


class SequenceTower(Tower):
    """Base of models that see the events of sequences.

    `forward(numeric_bn, embeddings, events)` returns logits as `Tower` does. events: name of a SequenceGroup -> its
    events.
    """

    reads_sequences = True


def drawn_inputs(
    tower: Tower, fields: Fields, rows: int, *, length: int | None = None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Events]]:
    """Return inputs of a tower with random values that ask for gradients, to try it or to count what it does.

    length: events of each row and group; None: as many as they may have.
    """
    numeric = torch.rand(rows, fields.columns, requires_grad=True)
    dims = tower.embedding_dims
    embeddings = {group: torch.rand(rows, len(fields.ids), dim, requires_grad=True) for group, dim in dims.items()}
    events = {}
    for group in fields.sequences:
        count = rows * (group.length if length is None else length)
        of = {
            name: {one: torch.rand(count, dim, requires_grad=True) for one in group.ids} for name, dim in dims.items()
        }
        numbers = {one: torch.rand(count) for one in group.numbers}
        events[group.name] = Events(torch.arange(rows + 1) * (count // rows), of, numbers)
    return numeric, embeddings, events


def logits_of(tower: Tower, numeric_bn: Tensor, embeddings: dict[str, Tensor], events: dict[str, Events]) -> Tensor:
    """Return what the tower says of a batch."""
    return tower(numeric_bn, embeddings, events) if tower.reads_sequences else tower(numeric_bn, embeddings)
