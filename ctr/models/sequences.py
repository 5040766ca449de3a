"""What models of sequences share: sums over the events of each row, views padded to one length, and Dice.

Events of a batch lie one after the other, [N, D], with int64 offsets [B + 1]: row b has the events offsets[b] to
offsets[b + 1]. Nothing is padded unless a layer needs a rectangle, and then to the longest row of the batch on this
rank, or on a GPU, which the host would have to ask for it, to the longest that the schema allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera.ctr.models.batch_norm import BatchNorm
from tessera.ctr.models.tower import Events, Fields, SequenceGroup
from tessera.embedding.errors import ConfigError
from tessera.kernels.pool import pool


def row_of_events(offsets: Tensor, events: int) -> Tensor:
    """Return the row of each event, int64 [events]."""
    rows = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff(), output_size=events)


def sum_of_events(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum over each row's events, [B, D]; zeros for a row without. values: [N, D].

    In float32 it is the sum that pooled features have, bit for bit: summed in order, and no race decides on a GPU.
    """
    if values.dtype == torch.float32 and not torch.compiler.is_compiling():  # a graph has torch's operations alone
        places = torch.arange(len(values), device=values.device)
        return pool(values, places, offsets)[0][:, 0]
    sums = values.new_zeros(offsets.shape[0] - 1, values.shape[1])
    return sums.index_add(0, row_of_events(offsets, values.shape[0]), values)


def mean_of_events(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the mean over each row's events, [B, D]; zeros for a row without. values: [N, D]."""
    lengths = offsets.diff().clamp_min(1).unsqueeze(1).to(torch.int32)
    return sum_of_events(values, offsets) * (1.0 / lengths).to(values.dtype)


@dataclass(frozen=True)
class Padded:
    """Places of events in a rectangle. index: int64 [B, L], the event at each place (0 where there is none); mask: bool
    [B, L], where there is one; offsets: int64 [B + 1] of the events."""

    index: Tensor
    mask: Tensor
    offsets: Tensor

    def of(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Return values [N, ...] as [B, L, ...], `fill` where there is no event."""
        if not values.shape[0]:
            # The sum of nothing keeps the way of gradients open, on which every rank waits.
            return values.new_full((*self.mask.shape, *values.shape[1:]), fill) + values.sum()
        mask = self.mask.view(*self.mask.shape, *[1] * (values.dim() - 1))
        return torch.where(mask, values[self.index], fill)

    def back(self, values: Tensor, events: int) -> Tensor:
        """Return what stands in [B, L, ...] at the places of the events, [events, ...]."""
        rows = row_of_events(self.offsets, events)
        places = torch.arange(events, device=rows.device) - self.offsets[rows]
        return values[rows, places]


def padded(events: Events, longest: int) -> Padded:
    """Return where the events of each row stand in [B, L], from the left. longest: events of a row at most."""
    offsets, lengths = events.offsets, events.offsets.diff()
    if events.longest is not None:
        longest = events.longest
    elif offsets.device.type == "cpu":
        longest = int(lengths.max()) if len(lengths) else 0
    places = torch.arange(longest, device=offsets.device)
    mask = places < lengths.unsqueeze(1)
    return Padded(torch.where(mask, offsets[:-1].unsqueeze(1) + places, 0), mask, offsets)


class EventVectors(nn.Module):
    """Each event as one vector, and the row's own target in the same places.

    An event is the embeddings of its aligned ids side by side, then its numbers. The target has the embeddings of the
    row's fields of the same tables; where there is none (an action, an age: unknown of the target) it has zeros.

    Attributes:
        width: of the vectors.
        fields: places of the target's fields among `Fields.ids`.
    """

    def __init__(self, group: SequenceGroup, dim: int) -> None:
        super().__init__()
        self.group, self.dim = group, dim
        self.width = len(group.ids) * dim + len(group.numbers)
        self.fields = [place for place in group.targets if place is not None]

    def events(self, events: Events, name: str = "v") -> Tensor:
        """Return [N, width] of the group of embeddings `name`."""
        of = events.embeddings[name]
        numbers = [events.numbers[one].unsqueeze(1).to(of[self.group.ids[0]]) for one in self.group.numbers]
        return torch.cat([*(of[one] for one in self.group.ids), *numbers], 1)

    def target(self, emb_bfd: Tensor) -> Tensor:
        """Return [B, width]. emb_bfd: [B, id fields, dim] of the same group of embeddings."""
        nothing = emb_bfd.new_zeros(emb_bfd.shape[0], self.dim)
        of = [nothing if place is None else emb_bfd[:, place] for place in self.group.targets]
        return torch.cat([*of, emb_bfd.new_zeros(emb_bfd.shape[0], len(self.group.numbers))], 1)


class Dice(nn.Module):
    """f(s) = p s + (1 - p) alpha s with p = sigmoid((s - mean) / sqrt(variance + eps)), alpha learned per channel
    (DIN section 5.3). Mean and variance are those of all events of the global batch; running ones in evaluation."""

    def __init__(self, channels: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.norm = BatchNorm(channels, eps=eps, affine=False)
        self.norm.of_events = True
        del self.norm._parameters["weight"], self.norm._parameters["bias"]
        self.norm.register_buffer("weight", torch.ones(channels), persistent=False)
        self.norm.register_buffer("bias", torch.zeros(channels), persistent=False)
        self.alpha = nn.Parameter(torch.zeros(channels))

    def forward(self, s: Tensor) -> Tensor:
        """Map [N, channels] to the same."""
        p = torch.sigmoid(self.norm(s))
        return p * s + (1 - p) * self.alpha * s


def one_group(model: str, fields: Fields) -> SequenceGroup:
    """Return the group of sequences of a model that reads one. Raises ConfigError unless there is exactly one."""
    if len(fields.sequences) != 1:
        names = [group.name for group in fields.sequences]
        raise ConfigError(
            f"model.target is {model}, which reads one group of aligned sequences, and the schema has "
            f"{len(names) or 'none'}{f' ({names[0]}, {names[1]}, ..)' if names else ''}; give its features pooling: "
            "none and one align"
        )
    return with_target(model, fields.sequences[0])


def with_target(model: str, group: SequenceGroup) -> SequenceGroup:
    """Return the group. Raises ConfigError if no field of the row has a table of its sequences."""
    if all(target is None for target in group.targets):
        raise ConfigError(
            f"model.target is {model}, which compares events with the row's own item, but no field has the table of "
            f"a sequence of {group.name!r} ({', '.join(group.ids)}); give one of them table: the field's"
        )
    return group
