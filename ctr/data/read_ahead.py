"""The lanes of one rank in one epoch, decoded ahead of their delivery by a pool of threads."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from ctr.data.lanes import ROW_GROUPS, WINDOW, lane_offsets, lane_starts, rank_bounds, seeded_order
from ctr.data.row_groups import Piece, RowGroupReader, take_rows
from ctr.data.window import Slice, Window

if TYPE_CHECKING:
    from ctr.data.reader import ParquetReader


class ReadAhead:
    """Memory: per lane the window that is delivered, the next one, and one record batch of its row group."""

    def __init__(self, reader: ParquetReader, epoch: int, position: int):
        self.reader, self.epoch = reader, epoch
        order = np.arange(len(reader.groups.rows))
        if reader.shuffle:
            order = seeded_order(len(order), ROW_GROUPS, reader.seed, epoch, 0, 0)
        self.row_groups = RowGroupReader(reader.groups, reader.decoder.columns, order)
        starts = lane_starts(reader.rows, reader.lanes)
        offsets = lane_offsets(position, reader.lanes)
        first, stop = rank_bounds(reader.world_size, reader.lanes)[[reader.rank, reader.rank + 1]]
        self.lanes = [
            _Lane(lane, int(starts[lane]), int(starts[lane + 1]), int(offsets[lane]), reader.window_rows)
            for lane in range(first, stop)
        ]
        self.stopped = threading.Event()

    def __enter__(self) -> ReadAhead:
        self.pool = ThreadPoolExecutor(self.reader.threads, "decode")
        self.row_groups.share([lane.begin for lane in self.lanes if lane.begin < lane.stop])
        for lane in self.lanes:
            lane.pieces = self.row_groups.lane(lane.begin, lane.stop)
            self._submit(lane)
        return self

    def __exit__(self, *error) -> None:
        self.stopped.set()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def slices(self, position: int, stop: int) -> list[Slice]:
        """What this rank's lanes deliver between two positions of the epoch, lane by lane.

        Waits for the threads. Raises what they raised.
        """
        first_rows = lane_offsets(position, self.reader.lanes)
        last_rows = lane_offsets(stop, self.reader.lanes)
        counts: Counter[str] = Counter()
        slices = []
        for lane in self.lanes:
            row, last = int(first_rows[lane.number]), int(last_rows[lane.number])
            while row < last:
                window = self._window(lane, row // lane.window_rows)
                begin = lane.index * lane.window_rows
                until = min(last, begin + lane.window_rows)
                slices.append(Slice(window, *window.span(row - begin, until - begin)))
                counts.update(window.dropped(row - begin, until - begin))
                row = until
        for reason, rows in counts.items():
            self.reader.bad_row_counts[reason] = self.reader.bad_row_counts.get(reason, 0) + rows
        return slices

    def _window(self, lane: _Lane, index: int) -> Window:
        if lane.index != index:
            assert lane.next is not None and index == lane.index + 1, (lane.number, lane.index, index)
            lane.window = None  # before the next one is asked for: two windows are the limit
            lane.window, lane.index = lane.next.result(), index
            self._submit(lane)
        return lane.window

    def _submit(self, lane: _Lane) -> None:
        rows = min(lane.window_rows, lane.stop - lane.start - (lane.index + 1) * lane.window_rows)
        lane.next = self.pool.submit(self._decode, lane, lane.index + 1, rows) if rows > 0 else None

    def _decode(self, lane: _Lane, index: int, rows: int) -> Window | None:
        if self.stopped.is_set():
            return None
        reader = self.reader
        order = None
        if reader.shuffle:
            order = seeded_order(rows, WINDOW, reader.seed, self.epoch, lane.number, index)
        return reader.decoder.decode(take_rows(lane.pieces, lane.rest, rows), order)


class _Lane:
    """One lane and where it stands. One window of a lane is decoded at a time, so its pieces need no lock."""

    def __init__(self, number: int, start: int, stop: int, offset: int, window_rows: int):
        self.number, self.start, self.stop, self.window_rows = number, start, stop, window_rows
        self.index = offset // window_rows - 1  # of the window being delivered
        self.begin = start + (self.index + 1) * window_rows  # where decoding begins, in the epoch's order
        self.window: Window | None = None
        self.next: Future[Window | None] | None = None
        self.pieces = iter(())
        self.rest: list[Piece] = []
