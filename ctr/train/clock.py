"""Agree between ranks, before a step's look-ups, on the weight of its rows, whether to stop, and the time.

Rows expire by the clock of the tables. With `embedding.clock: wall` it is the wall clock. By default it follows the
events of the data, and no single row can move it:

- The clock is at the newest time of the batches of this epoch so far, where a batch's newest time leaves out its newest
  1 % of rows, one row at least.
- A batch that would move it on by more than `data.schema.time_jump_days` is looked at as a whole, and so is the first
  one of an epoch: the clock then goes no further than that many days beyond the median of the batch's times. So some
  rows of far in the future stay without effect, and behind a real gap in the data, where most rows lie there, it
  follows at once.
- It does not go back within an epoch. Each epoch sets it anew, as it may begin with older days again.

It depends on the batches alone, so it is the same on any number of ranks; the last value is saved in states.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.periods import span
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.table_settings import shortest_ttl_days
from tessera.distributed.collectives import gather
from tessera.distributed.rank import Process

LEFT_OUT = 100  # one row of so many
DAY = 86400


class Agreed(NamedTuple):
    """weight: summed over the global batch; now: the clock, seconds; stop: whether a rank was asked to stop."""

    weight: float
    now: int
    stop: bool


class Clock:
    def __init__(self, config: Config, process: Process) -> None:
        self.of_events = config.embedding.clock == "event" and config.data.schema.time is not None
        self._process = process
        self._jump = int(config.data.schema.time_jump_days * DAY)
        self._newest = left_out(config.trainer.batch_size) + 1
        self._sent = sent_times(config.trainer.batch_size, process.world_size)

    def tell(self, batch: Batch) -> Tensor:
        """Return what this rank tells all ranks of its batch: float64 [n], n the same for all."""
        mine = [float(batch.weight.sum()), float(self._process.stop_asked)]
        if not self.of_events:
            return torch.tensor([*mine, time.time()], dtype=torch.float64)
        return torch.cat([torch.tensor([*mine, batch.rows], dtype=torch.float64), _newest(_times(batch), self._sent)])

    def agree(self, batch: Batch, told: Tensor, before: int) -> Agreed:
        """Collective, though seldom more is exchanged. told: what all ranks `tell` of a step, [ranks, n]; batch: this
        rank's; before: the clock of the step before this one in this epoch, 0 if this is its first."""
        weights, stops, third = told[:, :3].unbind(1)
        now = self._follow(told[:, 3:], third, _times(batch), before) if self.of_events else int(third.max())
        return Agreed(weights.sum().item(), now, bool(stops.any()))

    def _follow(self, newest: Tensor, rows_of_ranks: Tensor, times: Tensor, before: int) -> int:
        """Return the clock behind a batch. newest: float64 [ranks, n] of each rank's times; times: this rank's."""
        rows = int(rows_of_ranks.sum())
        if not rows:
            return before
        place = min(left_out(rows), rows - 1)
        found = _at(newest, place)
        if ((newest[:, -1] > found) & (rows_of_ranks > newest.shape[1])).any():
            # A rank has so many of the newest that it may not have sent all of them.
            found = _at(gather(_newest(times, self._newest)), place)
        found = int(found)
        if not before or found > before + self._jump:
            found = min(found, self._median(times, rows) + self._jump)
        return max(before, found)

    def _median(self, times: Tensor, rows: int) -> int:
        """Return the median of all ranks' times. Seldom asked for: every rank sends all its times."""
        counts = gather(torch.tensor([len(times)])).flatten().tolist()
        mine = torch.zeros(max(counts), dtype=torch.int64)
        mine[: len(times)] = times
        everyone = gather(mine)
        known = torch.cat([one[:count] for one, count in zip(everyone, counts, strict=True)])
        return int(known.kthvalue((rows + 1) // 2).values)


def _times(batch: Batch) -> Tensor:
    assert batch.time is not None  # the schema has a time
    return batch.time[: batch.rows]


def _newest(times: Tensor, count: int) -> Tensor:
    """Return the newest times, descending: float64 [count], -inf where there are fewer."""
    found = torch.full((count,), -torch.inf, dtype=torch.float64)
    found[: len(times)] = times.topk(min(count, len(times))).values.double()
    return found


def _at(newest: Tensor, place: int) -> float:
    """Return the time that so many others are newer than, -inf where there are not so many."""
    times = newest.flatten().sort(descending=True).values
    return times[place].item() if place < len(times) else -torch.inf


def sent_times(batch_size: int, ranks: int) -> int:
    """Return how many of its newest times a rank sends: those of the batch that do not move the clock, and one, as they
    fall to ranks by chance. Six standard deviations more than the mean make a second exchange rare."""
    newest = left_out(batch_size) + 1
    mean = newest / ranks
    return min(newest, math.ceil(mean + 6 * math.sqrt(mean)))


def left_out(rows: int) -> int:
    """Return the number of the newest rows of a batch that cannot move the clock."""
    return max(1, rows // LEFT_OUT)


def ttl_in_vain(config: Config, reader: ParquetReader) -> str | None:
    """Return one sentence if rows expire sooner than one batch reaches back; None otherwise."""
    ttl, times = shortest_ttl_days(config), reader.schema.times
    if ttl is None or times is None or config.embedding.clock != "event":
        return None
    seconds: float = span(reader.groups, times) or 0
    if reader.order == "time":
        seconds = min(seconds, reader.period_days * DAY)
    if seconds <= ttl * DAY:
        return None
    line = (
        f"{_named(config, ttl)} is {ttl:g}, but a batch holds rows of {seconds / DAY:.1f} days: ids of the first expire"
    )
    if reader.order == "time":
        return f"{line} while their days are read; data.period_days={ttl:g} or less, or a longer TTL, keeps them"
    return f"{line} as soon as they are trained; data.order=time reads day after day"


def _named(config: Config, ttl: float) -> str:
    """Return the key that this TTL stands in."""
    tables = (name for name, one in (config.embedding.tables or {}).items() if one.get("ttl_days") == ttl)
    return "embedding.ttl_days" if config.embedding.ttl_days == ttl else f"embedding.tables.{next(tables)}.ttl_days"
