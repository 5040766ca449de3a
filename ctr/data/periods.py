"""Order an epoch by time: row groups are dealt to periods, which are read one after the other.

With `data.order: mixed` an epoch is one period that holds all row groups. With `data.order: time` a row group belongs
to the period (`data.period_days` from 1970 on, UTC) in which the middle of its times lies. Inside a period rows are
shuffled, dealt to lanes and lanes to ranks as those of a whole epoch are (`lanes.py`); its last batch may be short, as
that of an epoch is. A position in the epoch stays one integer: the rows of the periods before, and those of this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.footers import RowGroups
from tessera.ctr.data.times import DAY, TimeRule

ORDERS = ("mixed", "time")


@dataclass(frozen=True)
class Period:
    """Row groups of one period. groups: int64 [g] numbers of row groups, in the order of the files; the rows [first,
    stop) of the epoch are theirs. number: of the period, from 0."""

    number: int
    groups: np.ndarray
    first: int
    stop: int


def one_period(groups: RowGroups) -> list[Period]:
    return [Period(0, np.arange(len(groups.rows)), 0, int(groups.rows.sum()))]


def periods_of(groups: RowGroups, rule: TimeRule, period_days: float) -> list[Period]:
    """Deal row groups to periods. Raises DataError for a row group that spans more than a period: its rows cannot be
    read in order of time."""
    seconds = period_days * DAY
    assert groups.times is not None  # the schema has a time
    times = plausible(groups.times, rule)
    unknown = np.flatnonzero(times[:, 0] > times[:, 1])
    if len(unknown):
        raise DataError(
            f"{groups.where(int(unknown[0]))}: its footer has no smallest and largest {rule.column!r} from which "
            "data.order=time could tell when its rows are; write the files with statistics of this column"
        )
    spans = times[:, 1] - times[:, 0]
    if spans.max() > seconds:
        group = int(spans.argmax())
        begin, end = (f"{datetime.fromtimestamp(int(t), timezone.utc):%Y-%m-%d %H:%M}" for t in times[group])
        raise DataError(
            f"{groups.where(group)}: its rows are from {begin} to {end}, more than data.period_days {period_days:g}; "
            "data.order=time needs files written in order of time, smaller row groups, or longer periods"
        )
    of_group = ((times[:, 0] + spans // 2) // seconds).astype(np.int64)
    found, first = [], 0
    for number, period in enumerate(np.unique(of_group)):
        chosen = np.flatnonzero(of_group == period)
        stop = first + int(groups.rows[chosen].sum())
        found.append(Period(number, chosen, first, stop))
        first = stop
    return [period for period in found if period.stop > period.first]


def plausible(times: np.ndarray, rule: TimeRule) -> np.ndarray:
    """Return smallest and largest times of row groups (int64 [groups, 2]), with an implausible one replaced by the
    other: the row that has it is bad. If both are implausible, the first is above the second."""
    times = times.copy()
    wrong = rule.outside(times)
    times[:, 0] = np.where(wrong[:, 0], times[:, 1], times[:, 0])
    times[:, 1] = np.where(wrong[:, 1], times[:, 0], times[:, 1])
    times[wrong.all(1)] = (1, 0)
    return times


def span(groups: RowGroups, rule: TimeRule) -> int | None:
    """Return the seconds from the first to the last time of all rows, as far as footers tell; None if none does."""
    assert groups.times is not None  # the schema has a time
    times = plausible(groups.times, rule)
    times = times[times[:, 0] <= times[:, 1]]
    return int(times[:, 1].max() - times[:, 0].min()) if len(times) else None
