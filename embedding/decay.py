"""Decay of all rows in every step, at the cost of the rows that are touched.

In a step of rate r a row keeps 1 - r * decay of its values, whether the batch has it or not (decoupled: no part of the
gradient, as in AdamW, arXiv 1711.05101). A table knows the sum of log(1 - r * decay) over its steps, and a row what it
was when the row was written last. Whoever reads the row multiplies its values by

    kept = exp(exponent * (sum now - sum then))

where the exponent is 1 or, where rare ids decay more, count^-power with the row's count when it was written last.
Nothing of a row changes between: in an int format the codes and the scale stay, and the next update rounds the decayed
values after its step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.row_batch import RowBatch
from tessera.kernels.formats import is_int, stored_dtype
from tessera.kernels.quantise import dequantise, quantise
from tessera.kernels.reference.update import decay as decay_values

UNSEEN = float("nan")  # noted by a row that no step has seen: it keeps all


def of_step(rates: Tensor, decays: Tensor) -> Tensor:
    """Return what one step adds to the sums: log(1 - rate decay), float64 [T]."""
    return torch.log1p(-rates * decays)


def noted_now(sums: float | Tensor, counts: Tensor, optimizer: RowOptimizer) -> Tensor:
    """Return what rows note that are written now: float64 [n, 1 or 2]. sums: of their tables, float64 [n] or one for
    all; counts: int64 [n]."""
    sums = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device) + sums
    if not optimizer.decay_count_power:
        return sums[:, None]
    return torch.stack([sums, counts.double() ** -optimizer.decay_count_power], dim=1)


def kept(noted: Tensor, now: float | Tensor, before: float | Tensor | None = None) -> Tensor:
    """Return how much of their values rows keep up to now: float32 [n]. noted: float64 [n, 1 or 2]; now, before: sums
    of their table, of which rows that no step has seen take the second (None: the first)."""
    then = noted[:, 0]
    since = now - then.where(~then.isnan(), now if before is None else before)
    return (since if noted.shape[1] == 1 else since * noted[:, 1]).exp().float()


class DecaySum:
    """The sum of log(1 - rate decay) over the steps of one table.

    now: up to the last step. before: up to the one before it. ahead: whether rows may be added before the step before
    theirs is over, so that they cannot note the sum.
    """

    def __init__(self, optimizer: RowOptimizer) -> None:
        self.optimizer, self.floats = optimizer, 2 if optimizer.decay_count_power else 1
        self._decay = torch.tensor([optimizer.decay], dtype=torch.float64)
        self.now = self.before = 0.0
        self.ahead = False

    def step(self, rate: float) -> None:
        """Let a step of this rate pass."""
        self.before = self.now
        self.now += float(of_step(torch.tensor([rate], dtype=torch.float64), self._decay))


def decayed_rows(batch: RowBatch, config: DynamicTableConfig, part: Tensor) -> RowBatch:
    """Return rows whose values are decayed, for a table that does not know how far: the scale of an int format takes
    the factor, so that no code changes; other formats round to nearest. part: float32 [n], of its values that a row
    keeps.
    """
    values, state = [], []
    scale = None if batch.scale is None else batch.scale * part[:, None]
    for group, stored, of_group in _groups(batch, config):
        numbers = of_group.clone()
        if is_int(group.format):
            values.append(stored)
        else:
            plain = stored.clone(memory_format=torch.contiguous_format).view(stored_dtype(group.format))
            floats = dequantise(plain, None, group.format, group.dim)
            decay_values(config.optimizer.name, floats, numbers, part, config.optimizer.settings(config.optimizer.lr))
            rounded = quantise(floats, None, group.format, rounding="nearest")
            values.append(rounded.view(config.values_dtype))
        state.append(numbers)
    whole = {**vars(batch), "values": torch.cat(values, 1), "state": torch.cat(state, 1), "scale": scale, "decay": None}
    return RowBatch(**whole)


def _groups(batch: RowBatch, config: DynamicTableConfig) -> Iterator[tuple[Group, Tensor, Tensor]]:
    values = batch.values.split([config.values_columns(group) for group in config.groups], dim=1)
    states = batch.state.split([sum(config.state_widths(group)) for group in config.groups], dim=1)
    yield from zip(config.groups, values, states, strict=True)
