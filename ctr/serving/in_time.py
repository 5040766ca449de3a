"""Correct rows that are all known, as if they came in order of time: no label is read before it could be known."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tessera.ctr.serving.error_memory import ErrorMemory


@dataclass(frozen=True)
class Labelled:
    """Rows with their labels. hidden: float32 [n, H]; prediction: float32 [n]; label: [n]; counts: bool [n], whether
    the label is known at all."""

    hidden: Tensor
    prediction: Tensor
    label: Tensor
    counts: Tensor


def blocks_of(times: np.ndarray, seconds: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of blocks of sorted times: at most so many seconds long, and so many rows."""
    begin = 0
    while begin < len(times):
        end = int(np.searchsorted(times, times[begin] + seconds, "left"))
        end = min(max(end, begin + 1), begin + rows)
        yield begin, end
        begin = end


def corrected_in_time(
    memory: ErrorMemory,
    times: np.ndarray,
    read: Callable[[np.ndarray], Labelled],
    *,
    delay_seconds: int = 0,
    block_seconds: int = 300,
    block_rows: int = 10_000,
) -> np.ndarray:
    """Return the corrected predictions, float32 [n], of rows in the order given; the memory learns of them.

    A block of rows is read before anything of it is written. A label is known `delay_seconds` after its row's time, and
    is written before the first block that begins later than that. So the label of a row never changes its own score,
    nor that of a row that came before it was known.

    times: int64 [n], seconds, in any order; read: returns the rows of some places.
    """
    order = np.argsort(times, kind="stable")
    in_order = times[order]
    found = np.empty(len(times), np.float32)
    waiting: deque[tuple[int, int]] = deque()  # of rows in order: begin and end of what is not written yet

    def write_until(moment: float) -> None:
        """Write the rows whose labels are known before a moment."""
        while waiting:
            begin, end = waiting.popleft()
            stop = begin + int(np.searchsorted(in_order[begin:end] + delay_seconds, moment, "left"))
            if stop > begin:
                rows = read(order[begin:stop])
                memory.add(rows.hidden[rows.counts], rows.label[rows.counts], rows.prediction[rows.counts])
            if stop < end:
                waiting.appendleft((stop, end))
                return

    for begin, end in blocks_of(in_order, block_seconds, block_rows):
        write_until(in_order[begin])
        rows = read(order[begin:end])
        found[order[begin:end]] = memory.corrected(rows.hidden, rows.prediction).numpy()
        waiting.append((begin, end))
    write_until(np.inf)
    return found


def rows_of(hidden: Tensor, prediction: Tensor, label: Tensor) -> Callable[[np.ndarray], Labelled]:
    """Return what reads rows that are in memory, all of whose labels count."""

    def read(places: np.ndarray) -> Labelled:
        at = torch.from_numpy(places)
        return Labelled(hidden[at], prediction[at], label[at], torch.ones(len(at), dtype=torch.bool))

    return read
