"""A window: some thousand consecutive rows of one lane, decoded, checked, and in the order of delivery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tessera.ctr.data.bags import Bags

# Why a row is dropped. A row with several faults counts for the first one found.
GOOD = 0
REASONS = (
    "",
    "corrupt_row_group",
    "label",
    "weight",
    "time",
    "numeric",
    "id",
    "item_weight",
    "sequence",
    "sampled",
    "where",
)


@dataclass
class Window:
    """n scheduled rows of which m are good; the arrays hold the good ones only."""

    numeric: np.ndarray  # float32 [columns, m]
    ids: np.ndarray  # int64 [single-valued features, m]
    present: np.ndarray | None  # bool, as ids; None when all are
    bags: list[Bags]  # one per multi-valued feature, `bags.bags_of`
    labels: np.ndarray  # float32 [T, m], 0 where not known
    weight: np.ndarray | None  # float32 [m]
    group: np.ndarray | None  # int64 [m]
    time: np.ndarray | None  # int64 [m]
    number: np.ndarray | None = None  # int64 [m], of the row in the data set
    known: np.ndarray | None = None  # bool, as labels; None when all are
    reasons: np.ndarray | None = None  # uint8 [n], index into REASONS; None when all rows are good
    good_before: np.ndarray | None = None  # int64 [n + 1], good rows before each scheduled row
    buffers: tuple[np.ndarray, ...] = ()  # what the matrices lie in, to be used again

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """Return the range [first, stop) in the arrays of the good rows among the scheduled rows [first, stop). Call it
        only if some rows are bad."""
        assert self.good_before is not None
        return int(self.good_before[first]), int(self.good_before[stop])

    def good(self, first: int, stop: int) -> np.ndarray:
        """Return the positions of good rows among the scheduled rows [first, stop), int64 counted from `first`. Call it
        only if some rows are bad."""
        assert self.reasons is not None
        return np.flatnonzero(self.reasons[first:stop] == GOOD)

    def dropped(self, first: int, stop: int) -> dict[str, int]:
        """Return the number of dropped rows among the scheduled rows [first, stop), by reason. Call it only if some
        rows are bad."""
        assert self.reasons is not None
        counts = np.bincount(self.reasons[first:stop], minlength=len(REASONS))
        return {REASONS[i]: int(counts[i]) for i in np.flatnonzero(counts) if i != GOOD}

    def take(self, rows: np.ndarray) -> Window:
        """Return these rows of the arrays, in their order."""
        return Window(
            self.numeric[:, rows],
            self.ids[:, rows],
            None if self.present is None else self.present[:, rows],
            [bags.take(rows) for bags in self.bags],
            self.labels[:, rows],
            weight=_taken(self.weight, rows),
            group=_taken(self.group, rows),
            time=_taken(self.time, rows),
            number=_taken(self.number, rows),
            known=None if self.known is None else self.known[:, rows],
        )


def _taken(array: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if array is None else array[rows]


class Slice(NamedTuple):
    """The good rows [first, stop) of a window's arrays. places: int64, where they stand in the epoch's order."""

    window: Window
    first: int
    stop: int
    places: np.ndarray


class Buffers:
    """Recycled memory: matrices of finished windows are reused for new ones.

    Asking the system for it anew costs as much as filling it: every page is cleared first.
    """

    def __init__(self, window_rows: int):
        self.window_rows = window_rows
        self._free: dict[tuple, list[np.ndarray]] = {}

    def take(self, rows: int, columns: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
        """Return a matrix [rows, columns] of arbitrary content, and the buffer to give back. Thread-safe."""
        free = self._free.setdefault((rows, np.dtype(dtype)), [])
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.empty(rows * self.window_rows, dtype)
        return buffer[: rows * columns].reshape(rows, columns), buffer

    def give_back(self, *buffers: np.ndarray) -> None:
        """Take buffers back; their matrices must not be read after this."""
        for buffer in buffers:
            self._free[buffer.size // self.window_rows, buffer.dtype].append(buffer)
