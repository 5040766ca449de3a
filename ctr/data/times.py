"""Check event times, and describe those that are not plausible.

A time far outside the data would do more harm than its row: rows of tables expire by the times of others. So a row is
bad if its time lies outside a plausible range of the calendar, or if it is one of few (at most 1 % of a window) that
lie beyond all others with an empty stretch of more than `time_jump_days` between. Times far *before* the others do no
harm, and are kept. Where most of a column is implausible, and would not be in another unit, it is the unit that is
wrong: an error under any policy about bad rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from tessera.ctr.data.errors import SchemaError

TICKS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
DAY, YEAR = 86400, 31_556_952
FEWEST = 16  # times that are enough to tell that their unit is wrong
FEW = 100  # one row of so many; a window of fewer rows is too small to tell who is the exception


@dataclass(frozen=True)
class TimeRule:
    """Rule for the column of event times: the unit of its integers, the plausible range [first, stop) in seconds since
    1970, and the longest empty stretch (seconds) before times that few rows have."""

    column: str
    unit: str
    first: int
    stop: int
    jump: int

    @classmethod
    def of(cls, column: str, unit: str, time_from: str, time_to: str, jump_days: float) -> TimeRule:
        """Build a rule from the keys of the schema. Raises SchemaError for invalid values."""
        if unit not in TICKS_PER_SECOND:
            raise SchemaError(f"schema.time_unit: found {unit!r}, expected one of {', '.join(TICKS_PER_SECOND)}")
        first, stop = _seconds_of("time_from", time_from), _seconds_of("time_to", time_to)
        if first >= stop:
            raise SchemaError(f"schema.time_from: found {time_from}, expected a date before time_to {time_to}")
        if not 0 < jump_days < float("inf"):
            raise SchemaError(f"schema.time_jump_days: found {jump_days}, expected a number above 0")
        return cls(column, unit, first, stop, int(jump_days * DAY))

    @property
    def range(self) -> str:
        return f"a time from {_date(self.first)} to {_date(self.stop)}"

    @property
    def expected(self) -> str:
        return f"{self.range} (data.schema.time_from and time_to)"

    def outside(self, seconds: np.ndarray) -> np.ndarray:
        """Return bool [n] that marks times outside the plausible range."""
        return (seconds < self.first) | (seconds >= self.stop)


def unit_of(rule: TimeRule, stored: pa.DataType) -> str:
    """Return the unit in which a column's numbers are stored."""
    return stored.unit if types.is_timestamp(stored) else rule.unit


def advice(rule: TimeRule, stored: pa.DataType, seconds: int) -> str:
    """Return the end of a message about an implausible time: the unit in which it would be plausible; empty if there is
    none."""
    ticks = seconds * TICKS_PER_SECOND[unit_of(rule, stored)]
    fits = [u for u, per_second in TICKS_PER_SECOND.items() if rule.first <= ticks // per_second < rule.stop]
    if not fits or not (types.is_integer(stored) or types.is_timestamp(stored)):
        return ""
    if types.is_timestamp(stored):
        return f"; it was written as {stored}, but looks like {fits[0]}: write the column with its true unit"
    return f"; as {fits[0]} it would be plausible (data.schema.time_unit={fits[0]})"


def refuse_unit(rule: TimeRule, stored: pa.DataType, seconds: np.ndarray, where: Callable[[], str]) -> None:
    """Raise SchemaError if most of the times (int64 [n], without nulls) are implausible and would not be in another
    unit."""
    outside = seconds[rule.outside(seconds)]
    if len(seconds) < FEWEST or 2 * len(outside) <= len(seconds):
        return
    wrong = advice(rule, stored, int(np.median(outside)))
    if wrong:
        found = described(outside, unit_of(rule, stored))(0)
        raise SchemaError(f"{where()}: column {rule.column!r} found {found}, expected {rule.expected}{wrong}")


def described(seconds: np.ndarray, unit: str) -> Callable[[int], str]:
    """Return a function that describes the time of a row in a message: the number in the stored unit, and its year."""
    ticks = TICKS_PER_SECOND[unit]
    return lambda row: f"{int(seconds[row]) * ticks} {unit} (the year {1970 + int(seconds[row]) // YEAR})"


def times_of(metadata: pq.FileMetaData, rule: TimeRule) -> np.ndarray:
    """Return the smallest and the largest time of each row group from the footer: int64 [groups, 2] seconds; (1, 0) if
    it has none."""
    found = np.tile(np.array([1, 0]), (metadata.num_row_groups, 1))
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if rule.column not in names:
        return found
    leaf = names.index(rule.column)
    per_second = _ticks_of(metadata.schema.column(leaf), rule)
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(leaf).statistics
        if per_second and statistics is not None and statistics.has_min_max:
            found[group] = [int(raw * 86400 if per_second == DAYS else raw // per_second) for raw in
                            (statistics.min_raw, statistics.max_raw)]  # fmt: skip
    return found


DAYS = -1


def _ticks_of(column: pq.ColumnSchema, rule: TimeRule) -> int | None:
    """Return the units per second of a parquet column's integers; DAYS if they count days, None if they are no
    times."""
    if column.physical_type not in ("INT32", "INT64"):
        return None
    logical = json.loads(column.logical_type.to_json())
    if logical["Type"] == "Date":
        return DAYS
    if logical["Type"] == "Timestamp":
        return {"milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}[logical["timeUnit"]]
    return TICKS_PER_SECOND[rule.unit]


def far_future(rule: TimeRule, seconds: np.ndarray, fine: np.ndarray) -> np.ndarray | None:
    """Return bool [n] that marks the few rows of a window far beyond all others; None if there are none.

    seconds: int64 [n]; fine: bool [n], the rows that count.
    """
    known = seconds[fine]
    if len(known) < FEW or int(known.max()) - int(known.min()) <= rule.jump:
        return None
    known = np.sort(known)
    ends = np.flatnonzero(np.diff(known) > rule.jump) + 1  # of the groups of times without such a stretch inside
    bounds = np.concatenate([[0], ends, [len(known)]])
    sizes = np.diff(bounds)
    main = int(sizes.argmax())
    if 2 * sizes[main] <= len(known):
        return None
    late = np.flatnonzero((sizes <= len(known) // FEW) & (np.arange(len(sizes)) > main))
    if not len(late):
        return None
    in_future = np.zeros(len(seconds), bool)
    for group in late:
        in_future |= (seconds >= known[bounds[group]]) & (seconds <= known[bounds[group + 1] - 1])
    return in_future & fine


def _seconds_of(key: str, text: str) -> int:
    try:
        return int(datetime.fromisoformat(str(text)).replace(tzinfo=timezone.utc).timestamp())
    except ValueError:
        raise SchemaError(f"schema.{key}: found {text!r}, expected a date as 1990-01-01") from None


def _date(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d}"
