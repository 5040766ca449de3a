"""The tower of a model as a graph of its own, by torch.export: what serving and C++ run without the model's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.ctr.models.hidden import hidden_of
from tessera.ctr.models.tower import Events, SequenceGroup, Tower, logits_of
from tessera.embedding.errors import ConfigError

EXAMPLE_ROWS = 3  # traced with; another number would do, but 0 and 1, which torch.export takes for constants
MOST_ROWS = 1 << 24  # of a batch
MOST_EVENTS = 1 << 30


class ServedTower(nn.Module):
    """Numeric values and one tensor per group of embeddings -> logits, float32, as evaluation computes them.

    Of a tower that reads sequences, there follow for each group of aligned ones: events of each row, int64 [B]; int64
    [L], whose length alone counts, 2 or more and no less than the events of any row; for each group of embeddings and
    each sequence of ids [events, dim]; and for each sequence of numbers [events].

    amp: the tower runs in bfloat16, as in training with `trainer.amp`. sequences: `Fields.sequences`. hidden: answer
    also what the last layer reads, float32 [B, H], by which an error memory knows rows.
    """

    def __init__(
        self, tower: Tower, *, amp: bool, sequences: Sequence[SequenceGroup] = (), hidden: bool = False
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.tower, self.amp, self.sequences = tower, amp, tuple(sequences)
        self.groups = list(tower.embedding_dims)

    def forward(self, numeric_bn: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [B], or [B, labels]; with `hidden` a pair.

        numeric_bn: [B, numeric fields]; others: [B, id fields, dim] of each group of embeddings, then what sequences
        have.
        """
        if not self.hidden:
            return self._logits(numeric_bn, others)
        with hidden_of(self.tower) as hidden:
            logits = self._logits(numeric_bn, others)
            found = hidden.take()
        return logits, found[:-1] if self.sequences else found

    def _logits(self, numeric_bn: Tensor, others: Sequence[Tensor]) -> Tensor:
        count = len(self.groups)
        embeddings = dict(zip(self.groups, others[:count], strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            if not self.sequences:
                return self.tower(numeric_bn, embeddings).float()
            # One row with one event more: no sum or softmax meets an empty tensor, whose size would be a constant.
            embeddings = {name: _longer(values) for name, values in embeddings.items()}
            logits = logits_of(self.tower, _longer(numeric_bn), embeddings, self._events(list(others[count:])))
        return logits.float()[:-1]

    def _events(self, tensors: list[Tensor]) -> dict[str, Events]:
        events = {}
        for one in self.sequences:
            lengths, places = F.pad(tensors.pop(0), (0, 1), value=1), tensors.pop(0)
            offsets = F.pad(lengths.cumsum(0), (1, 0))
            of = {group: {name: _longer(tensors.pop(0)) for name in one.ids} for group in self.groups}
            numbers = {name: _longer(tensors.pop(0)) for name in one.numbers}
            events[one.name] = Events(offsets, of, numbers, longest=places.shape[0])
        return events


def _longer(values: Tensor) -> Tensor:
    """Return values [n, ...] with zeros behind them, [n + 1, ...]."""
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])


def inputs_of(
    dims: Mapping[str, int],
    numeric: int,
    ids: int,
    rows: int,
    seed: int = 0,
    sequences: Sequence[SequenceGroup] = (),
) -> tuple[Tensor, ...]:
    """Return random inputs of a tower: numeric values, each group's embeddings, and what sequences have. Some rows have
    no events; of one row alone that is the case where `seed` is odd."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = [torch.randn(rows, ids, dim, generator=draw) for dim in dims.values()]
    inputs = [torch.randn(rows, numeric, generator=draw), *embeddings]
    for one in sequences:
        number = torch.arange(rows) + seed
        lengths = (1 + number % min(one.length, 6)) * (number % 2 == 0)
        events = int(lengths.sum())
        inputs += [lengths, torch.arange(max(2, int(lengths.max())))]
        inputs += [torch.randn(events, dim, generator=draw) for dim in dims.values() for _ in one.ids]
        inputs += [torch.randn(events, generator=draw) for _ in one.numbers]
    return tuple(inputs)


@torch.no_grad()
def graph_of(served: ServedTower, numeric: int, ids: int) -> torch.export.ExportedProgram:
    """Return the graph of a tower for any number of rows.

    Raises ConfigError, one line: torch.export cannot trace it; it says why.
    """
    served = served.cpu().eval()
    inputs = inputs_of(served.tower.embedding_dims, numeric, ids, EXAMPLE_ROWS, sequences=served.sequences)
    shapes = _shapes(served)
    try:
        return torch.export.export(served, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of many kinds, from inside of torch
        kind = type(served.tower).__name__
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"model {kind} cannot be exported: torch.export says: {reason[:300]}") from None


def _shapes(served: ServedTower) -> tuple[Any, ...]:
    """Return which dimensions of a graph's inputs differ from call to call."""
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    others: list[dict[int, Any]] = [{0: rows} for _ in served.groups]
    for number, one in enumerate(served.sequences):
        events = torch.export.Dim(f"events{number}", min=0, max=MOST_EVENTS)
        longest = torch.export.Dim(f"longest{number}", min=2, max=MOST_EVENTS)
        others += [{0: rows}, {0: longest}]
        others += [{0: events} for _ in range(len(served.groups) * len(one.ids) + len(one.numbers))]
    return {0: rows}, tuple(others)


@torch.no_grad()
def largest_difference(served: ServedTower, module: Any, numeric: int, ids: int) -> float:
    """Return how far the logits of a graph, as a module, lie from those of its tower, at most (`difference_of`), on
    random rows: 1, 2 and 300."""
    largest = 0.0
    for rows in (1, 2, 300):
        inputs = inputs_of(served.tower.embedding_dims, numeric, ids, rows, rows, served.sequences)
        largest = max(largest, difference_of(module(*inputs), served(*inputs)))
    return largest


def difference_of(found: Tensor, expected: Tensor) -> float:
    """Return how far logits lie apart, at most; of those above 1, as a share of them: crosses of high degree make large
    ones, whose last bits are large too."""
    return float(((found - expected).abs() / expected.abs().clamp(min=1)).max())
