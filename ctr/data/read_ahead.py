"""Decode the lanes of one rank in one epoch ahead of their delivery, by a pool of threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from tessera.ctr.data.decode import Source, WindowDecoder
from tessera.ctr.data.footers import RowGroups
from tessera.ctr.data.lanes import (
    ROW_GROUPS,
    WINDOW,
    Span,
    lane_chunks,
    lane_offsets,
    lane_starts,
    rank_bounds,
    seeded_order,
)
from tessera.ctr.data.periods import Period
from tessera.ctr.data.row_groups import OPEN_FILES, RowGroupReader
from tessera.ctr.data.window import Buffers, Slice, Window

CHUNKS_PER_ORDER = 8  # other lanes have orders of their own. Another number is another lanes.ORDER


@dataclass(frozen=True)
class Reading:
    """Settings of one rank's reading of a data set: its part, the order, and how much is read at once.

    bad_row_counts: rows that were due and dropped, by reason; more are added here.
    """

    groups: RowGroups
    decoder: WindowDecoder
    buffers: Buffers
    lanes: int
    window_rows: int
    rank: int
    world_size: int
    seed: int
    shuffle: bool
    threads: int
    bad_row_counts: dict[str, int]


@dataclass(frozen=True)
class _Planned:
    """A window before it is decoded."""

    chunk: int  # number in the lane of the chunk that it is decoded with
    first: int  # row of the lane
    rows: int
    spans: list[Span]

    @property
    def group(self) -> int | None:
        """The row group of which this window is a part; None for a window made of several."""
        return self.spans[0].group if len(self.spans) == 1 else None


class _Lane:
    def __init__(self, number: int, plan: list[_Planned], offset: int):
        self.number = number
        self.plan = plan  # from the window that is due first
        self.due = deque(plan)  # windows that are not yet in delivery
        self.window: Window | None = None  # in delivery
        self.first = self.stop = offset  # rows of the lane in that window
        self.next: Future[Window | None] | None = None
        self.decoded: Iterator[Window] = iter(())
        self.orders: tuple[int, dict[int, np.ndarray]] = (-1, {})  # of some chunks' windows, by their rows


class ReadAhead:
    """Memory: per lane the window that is delivered, the next one, and what its row group gives beyond it.

    The last is another window for row groups that are decoded at once, else the open row group.
    """

    def __init__(self, reading: Reading, epoch: int, period: Period, position: int):
        """position: in the period."""
        self.reading, self.epoch, self.period = reading, epoch, period
        self.order = period.groups
        if reading.shuffle:
            self.order = self.order[seeded_order(len(self.order), ROW_GROUPS, reading.seed, epoch, 0, period.number)]
        self.row_groups = RowGroupReader(reading.groups, reading.decoder.columns, reading.window_rows)
        self.buffers = reading.buffers
        self.retired: list[Window] = []
        self.stopped = threading.Event()
        offsets = lane_offsets(position, reading.lanes).tolist()
        first, stop = rank_bounds(reading.world_size, reading.lanes)[[reading.rank, reading.rank + 1]]
        self.lanes = [_Lane(i, self._plan(i, offsets[i]), offsets[i]) for i in range(first, stop)]

    def __enter__(self) -> ReadAhead:
        self.pool = ThreadPoolExecutor(self.reading.threads, "decode")
        self.row_groups.share([lane.plan[0].spans[0].group for lane in self.lanes if lane.plan])
        for lane in self.lanes:
            lane.decoded = self._decode(lane)
            self._submit(lane)
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.pool.shutdown(wait=True, cancel_futures=True)
        # The next epoch fills the same memory: clearing new pages would cost it more than decoding into them.
        self._give_back(self.retired + [lane.window for lane in self.lanes if lane.window is not None])

    def _give_back(self, windows: list[Window]) -> None:
        while windows:
            self.buffers.give_back(*windows.pop().buffers)

    def slices(self, position: int, stop: int) -> list[Slice]:
        """Return the rows that this rank's lanes deliver between two positions of the epoch, lane by lane.

        They are valid until the next call. Waits for the threads; raises what they raised.
        """
        self._give_back(self.retired)
        rows = lane_offsets(position, self.reading.lanes).tolist()
        last_rows = lane_offsets(stop, self.reading.lanes).tolist()
        slices = []
        for lane in self.lanes:
            row, last = rows[lane.number], last_rows[lane.number]
            while row < last:
                if row == lane.stop:
                    self._advance(lane)
                until = min(last, lane.stop)
                window = lane.window
                assert window is not None  # the last call of `slices` comes before the threads are stopped
                first, end = row - lane.first, until - lane.first
                # Lanes deliver in turn: row k of lane i is row k * lanes + i of the epoch.
                places = np.arange(row, until) * self.reading.lanes + lane.number
                if window.reasons is not None:
                    self._count(window.dropped(first, end))
                    places = places[window.good(first, end)]
                    first, end = window.span(first, end)
                slices.append(Slice(window, first, end, places))
                row = until
        return slices

    def _count(self, dropped: dict[str, int]) -> None:
        counts = self.reading.bad_row_counts
        for reason, rows in dropped.items():
            counts[reason] = counts.get(reason, 0) + rows

    def _advance(self, lane: _Lane) -> None:
        if lane.window is not None:
            self.retired.append(lane.window)
        assert lane.next is not None, f"lane {lane.number} has no rows left"
        lane.window = lane.next.result()
        planned = lane.due.popleft()
        lane.first, lane.stop = planned.first, planned.first + planned.rows
        self._submit(lane)

    def _submit(self, lane: _Lane) -> None:
        # Only one window of a lane is in decoding at a time, so a lane's generators need no lock.
        lane.next = self.pool.submit(self._next, lane) if lane.due else None

    def _next(self, lane: _Lane) -> Window | None:
        return None if self.stopped.is_set() else next(lane.decoded)

    def _plan(self, lane: int, offset: int) -> list[_Planned]:
        """Return the windows of a lane, from the one that holds row `offset` of the lane on."""
        reading = self.reading
        rows = self.period.stop - self.period.first
        start, stop = lane_starts(rows, reading.lanes)[[lane, lane + 1]].tolist()
        plan, first = [], 0
        chunks = lane_chunks(self.order, reading.groups.rows, start, stop, reading.window_rows)
        for chunk, windows in enumerate(chunks):
            for spans in windows:
                rows = sum(span.stop - span.first for span in spans)
                if first + rows > offset:
                    plan.append(_Planned(chunk, first, rows, spans))
                first += rows
        return plan

    def _decode(self, lane: _Lane) -> Iterator[Window]:
        """Yield the decoded windows of the plan; runs in the threads of the pool."""
        row_groups = self.row_groups
        first = lane.plan[0].spans[0]
        # The chunks of one row group follow each other.
        for group, some in groupby(lane.plan, lambda window: window.group):
            windows = list(some)
            if group is None:
                for window in windows:
                    many = len(window.spans) > OPEN_FILES
                    sources = [
                        Source(s, row_groups.open(s.group, s.stop, begins_lane=s is first, of_many=many))
                        for s in window.spans
                    ]
                    decoded = self._decoded(lane, sources, [window])
                    for source in sources:  # a lane may stand here for long
                        source.group.close()
                    yield from decoded
                continue
            opened = row_groups.open(group, windows[-1].spans[0].stop, begins_lane=group == first.group)
            for _, neighbours in groupby(windows, lambda window: window.chunk):
                chunk = list(neighbours)
                span = Span(group, chunk[0].spans[0].first, chunk[-1].spans[0].stop)
                yield from self._decoded(lane, [Source(span, opened)], chunk)
            opened.close()

    def _decoded(self, lane: _Lane, sources: list[Source], windows: list[_Planned]) -> list[Window]:
        reading = self.reading
        pairs = [(window.rows, self._order(lane, window)) for window in windows]
        return reading.decoder.decode(sources, pairs, reading.buffers)

    def _order(self, lane: _Lane, window: _Planned) -> np.ndarray | None:
        """Return the order of a window's rows, int64 [rows]; None without shuffling. Drawing an order costs a sixth of
        decoding, so windows of some chunks that are equally long share one."""
        reading = self.reading
        if not reading.shuffle:
            return None
        block = window.chunk // CHUNKS_PER_ORDER
        if lane.orders[0] != block:
            lane.orders = (block, {})
        orders = lane.orders[1]
        if window.rows not in orders:
            key: tuple[int, ...] = (WINDOW, reading.seed, self.epoch, lane.number, block)
            key += (self.period.number,) if self.period.number else ()  # those of the first one are as before
            orders[window.rows] = seeded_order(window.rows, *key)
        return orders[window.rows]
