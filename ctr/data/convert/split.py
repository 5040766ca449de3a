"""Assign each row to a folder of the prepared data set.

A splitter is called with some rows and a key for each (int64, made of file and line number), and returns the
folder names and, for each row, the index of its folder. It sees one block of rows at a time and keeps
nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tessera.ctr.data.counter_random import bits, key, uniform
from tessera.ctr.data.errors import DataError
from tessera.embedding.errors import ConfigError

Splitter = Callable[[pa.Table, np.ndarray], tuple[list[str], np.ndarray]]

SPLITS = ["train", "valid", "test"]
SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 86400


def into(folder: str) -> Splitter:
    """Send every row to `folder`."""

    def assign(table: pa.Table, row_keys: np.ndarray) -> tuple[list[str], np.ndarray]:
        return [folder], np.zeros(table.num_rows, dtype=np.int64)

    return assign


def by_fraction(valid: float, test: float, seed: int) -> Splitter:
    """Split into train, valid and test at random, by (seed, row key) alone: no shuffle, and independent of the block
    size.

    Raises ConfigError unless 0 <= valid, 0 <= test and valid + test < 1.
    """
    _check_fractions(valid, test)
    stream = key(seed)

    def assign(table: pa.Table, row_keys: np.ndarray) -> tuple[list[str], np.ndarray]:
        x = uniform(bits(stream, row_keys.astype(np.uint64)))
        return SPLITS, (x >= 1.0 - valid - test).astype(np.int64) + (x >= 1.0 - test)

    return assign


def by_time(column: str, valid_from: int, test_from: int) -> Splitter:
    """Send rows before `valid_from` (seconds) to train, before `test_from` to valid, and all later ones to test.

    Raises ConfigError unless valid_from <= test_from.
    """
    if valid_from > test_from:
        raise ConfigError(f"valid_from: found {valid_from}, expected at most test_from, which is {test_from}")

    def assign(table: pa.Table, row_keys: np.ndarray) -> tuple[list[str], np.ndarray]:
        seconds = _times(table, column)
        return SPLITS, (seconds >= valid_from).astype(np.int64) + (seconds >= test_from)

    return assign


def by_day(column: str) -> Splitter:
    """Send each row to `day=YYYY-MM-DD`, the day (UTC) of its time."""

    def assign(table: pa.Table, row_keys: np.ndarray) -> tuple[list[str], np.ndarray]:
        seconds = _times(table, column)
        days, index = np.unique(np.floor_divide(seconds, SECONDS_PER_DAY), return_inverse=True)
        return [day_folder(day) for day in days.astype("datetime64[D]").astype(object)], index

    return assign


def day_folder(day: datetime.date) -> str:
    return f"day={day.isoformat()}"


@dataclass
class HourCounts:
    """Counts rows per hour, to find the times that cut off the last fractions of a log without sorting it."""

    counts: dict[int, int]

    def add(self, seconds: np.ndarray) -> None:
        hours, counts = np.unique(np.floor_divide(seconds, SECONDS_PER_HOUR), return_counts=True)
        for hour, count in zip(hours.tolist(), counts.tolist(), strict=True):
            self.counts[hour] = self.counts.get(hour, 0) + count

    def cuts(self, valid: float, test: float) -> tuple[int, int]:
        """Return (valid_from, test_from) in seconds, on whole hours: the last `test` of the rows, and `valid` before
        them, as nearly as whole hours allow. Raises ConfigError for impossible fractions, DataError without rows."""
        _check_fractions(valid, test)
        if not self.counts:
            raise DataError("no rows with a time found, expected some to split by time")
        hours = np.array(sorted(self.counts), dtype=np.int64)
        rows = np.array([self.counts[hour] for hour in hours.tolist()])
        before = np.concatenate(([0], np.cumsum(rows))) / rows.sum()
        edges = np.append(hours, hours[-1] + 1) * SECONDS_PER_HOUR
        valid_from, test_from = (int(edges[np.abs(before - x).argmin()]) for x in (1 - valid - test, 1 - test))
        return valid_from, test_from


def seconds_of(text: str, where: str = "time") -> int:
    """Return seconds since 1970 UTC of "1414281600", "2014-10-26" or "2014-10-26T06:00:00". Raises ConfigError for
    other text, beginning with `where` it was found."""
    if text.lstrip("-").isdigit():
        return int(text)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{where}: found {text!r}, expected seconds since 1970 or an ISO date such as 2014-10-26"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp())


def _check_fractions(valid: float, test: float) -> None:
    if not (valid >= 0 and test >= 0 and valid + test < 1):
        raise ConfigError(
            f"valid and test fractions: found {valid} and {test}, expected both at least 0 and their sum below 1"
        )


def _times(table: pa.Table, column: str) -> np.ndarray:
    times = table.column(column)
    assert times.null_count == 0, "rows without a time are met before the split"
    return times.to_numpy()
