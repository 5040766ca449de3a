"""Read parquet to batches: every row of an epoch exactly once over all ranks, at a position that is a few integers.

Read on: `lanes.py` for the order, `row_groups.py` for parquet to Arrow, `decode.py` for Arrow to numpy
windows, `read_ahead.py` for the threads that do both, `assemble.py` for windows to `Batch`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tessera.ctr.data.day_folders import DayFolders
from tessera.ctr.data.decode import WindowDecoder
from tessera.ctr.data.errors import DataError
from tessera.ctr.data.expressions import filter_of
from tessera.ctr.data.footers import read_footers
from tessera.ctr.data.lanes import ORDER, lane_offsets, scheduled_rows
from tessera.ctr.data.listing import MARKER, Listing, list_files
from tessera.ctr.data.negatives import Negatives
from tessera.ctr.data.periods import ORDERS, Period, one_period, periods_of
from tessera.ctr.data.read_ahead import ReadAhead, Reading
from tessera.ctr.data.schema import Schema, nearest
from tessera.ctr.data.window import Buffers
from tessera.embedding.errors import ConfigError

if TYPE_CHECKING:  # torchrec takes seconds to import, and a reader is built and checked without it
    from tessera.ctr.data.batch import Batch


class ParquetReader:
    """Reads one data set for one rank.

    Attributes:
        rows: rows of the data set
        steps_per_epoch: batches of an epoch that starts at its beginning; the same on every rank
        bad_row_counts: rows of this rank that were due and dropped so far, by reason
        passed_over: entries below the paths that hold no rows, such as markers and checksums
    """

    def __init__(
        self,
        path: str | Listing | Sequence[str | Listing],
        schema: Schema,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        *,
        shuffle: bool = True,
        lanes: int = 16,
        window_rows: int = 32768,
        threads: int = 1,
        bad_rows: str = "raise",
        days: list[str] | None = None,
        drop_labels: bool = False,
        replay: str | None = None,
        replay_weight: float = 1.0,
        numbered: bool = False,
        nested: bool = False,
        folders: DayFolders = DayFolders(),  # noqa: B008
        marker: str | None = MARKER,
        order: str = "mixed",
        period_days: float = 1.0,
        negative_rate: float = 1.0,
        where: str | None = None,
    ):
        """List the files and check all footers.

        path: folders, files, patterns or URIs, or what is listed already. batch_size: rows of all ranks' step. lanes,
        window_rows: shape of the shuffle; an epoch is continued only with the same. bad_rows: raise | skip. days,
        folders, marker: as those of `list_files`. drop_labels: for data without labels, which are then 0 in the
        batches. replay: more rows of the same data set, whatever their days, with `replay_weight` on their weights.
        numbered: batches have the numbers of their rows, those of `path` in the order of files and row groups first,
        then `replay`'s. nested: as that of `WindowDecoder`. order: mixed | time: period after period of so many days
        (`periods.py`). negative_rate: the share of rows with label 0 that is read (`negatives.py`).
        where: only rows of which this is true (`expressions.py`).

        Raises ConfigError, SchemaError or DataError, one line each.
        """
        _check_settings(batch_size, rank, world_size, lanes, window_rows, threads, bad_rows)
        if order not in ORDERS:
            raise ConfigError(f"data.order: found {order!r}; {nearest(order, ORDERS)}")
        if not 0 < period_days < float("inf"):
            raise ConfigError(f"data.period_days: found {period_days}, expected a number above 0")
        self.schema = schema
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.lanes, self.window_rows, self.threads = lanes, window_rows, threads
        listing = list_files(path, days, folders, marker)
        files, self.passed_over = listing.files, listing.passed_over
        replayed = list_files(replay).files if replay else []
        rows_where = None if where is None else filter_of(where)
        self.groups = read_footers(files + replayed, schema, drop_labels=drop_labels, where=rows_where)
        if replayed and replay_weight != 1:
            of_file = np.repeat(np.array([1, replay_weight], np.float32), [len(files), len(replayed)])
            self.groups = replace(self.groups, weight=of_file[self.groups.file])
        self.rows = int(self.groups.rows.sum())
        self.order, self.period_days = order, period_days
        self.periods = self._periods()
        self.steps_per_epoch = self._steps_until(self.rows)
        self.bad_row_counts: dict[str, int] = {}
        self.numbered = numbered
        self.decoder = WindowDecoder(
            schema,
            self.groups,
            skip_bad_rows=bad_rows == "skip",
            drop_labels=drop_labels,
            numbered=numbered,
            nested=nested,
            negatives=Negatives(negative_rate, seed) if negative_rate < 1 else None,
            where=rows_where,
        )
        self.negative_rate, self.where = negative_rate, where
        self.buffers = Buffers(window_rows)
        self._fingerprint, self._contents = self.groups.fingerprint, self.groups.contents
        self._epoch, self._position = 0, 0
        self._resumed = False

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, from the loaded state if there is one, else from the start.

        Raises DataError when the loaded state stands inside another epoch, and for bad rows as configured.
        """
        if self._resumed and self._epoch != epoch and 0 < self._position < self.rows:
            raise DataError(
                f"reader state: found row {self._position} of {self.rows} of epoch {self._epoch}, "
                f"expected a state of epoch {epoch}"
            )
        if not self._resumed or self._epoch != epoch:
            self._epoch, self._position = epoch, 0
        self._resumed = False
        return self._deliver(epoch, self._position)

    def part(self, first: int, stop: int) -> ParquetReader:
        """Return a reader of the row groups [first, stop) alone, whose rows keep the numbers that they have here."""
        one = copy.copy(self)
        one.rows = int(self.groups.rows[first:stop].sum())
        one.periods = [Period(0, np.arange(first, stop), 0, one.rows)]
        one.steps_per_epoch = one._steps_until(one.rows)
        one._epoch, one._position, one._resumed = 0, 0, False
        return one

    @property
    def steps_done(self) -> int:
        """Number of batches of the current epoch delivered so far."""
        return self._steps_until(self._position)

    def _periods(self) -> list[Period]:
        if self.order == "mixed":
            return one_period(self.groups)
        if self.schema.times is None:
            raise ConfigError("data.order is time, but data.schema.time names no column")
        return periods_of(self.groups, self.schema.times, self.period_days)

    def _steps_until(self, position: int) -> int:
        """Return the number of batches of an epoch from its beginning up to a position."""
        parts = (min(position, period.stop) - period.first for period in self.periods if period.first < position)
        return sum(-(-rows // self.batch_size) for rows in parts)

    def state(self, batch: Batch | None = None) -> dict[str, Any]:
        """Return the position behind the batch delivered last, or behind `batch`, for `load_state`.

        It holds plain integers and strings, is the same on every rank, and fits any number of ranks and any
        batch size.
        """
        position = self._position if batch is None else batch.position
        return {
            "epoch": self._epoch,
            "lane_offsets": lane_offsets(position, self.lanes).tolist(),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "lanes": self.lanes,
            "window_rows": self.window_rows,
            "periods": None if self.order == "mixed" else self.period_days,
            "fingerprint": self._fingerprint,
            "contents": self._contents,
            "rows": self.rows,
            "order": ORDER,
            "negative_rate": self.negative_rate,
            "where": self.where,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Let the next call of `epoch(state["epoch"])` continue from this state.

        Raises DataError when the rows or their order would not be those of the state.
        """
        state = {"negative_rate": 1.0, "where": None} | state  # states of earlier versions have neither
        for key in ("lanes", "window_rows", "seed", "shuffle", "negative_rate", "where"):
            if state.get(key) != getattr(self, key):
                name = f"trainer.{key}" if key in ("seed", "shuffle") else f"data.{key}"
                raise DataError(
                    f"reader state: {name} found {getattr(self, key)!r}, expected {state.get(key)!r} as saved"
                )
        periods, saved = None if self.order == "mixed" else self.period_days, state.get("periods")
        if periods != saved:
            found, expected = (f"time with data.period_days {p:g}" if p else "mixed" for p in (periods, saved))
            raise DataError(f"reader state: data.order found {found}, expected {expected} as saved")
        self._refuse_other_data(state)
        position = int(sum(state["lane_offsets"]))
        saved_order = state.get("order", 1)
        if saved_order != ORDER and self.shuffle and 0 < position < self.rows:
            raise DataError(
                f"reader state: found row {position} of an epoch in row order {saved_order}, expected order {ORDER} "
                "of this version: finish the epoch with the version that saved it, or start from a state between epochs"
            )
        assert lane_offsets(position, self.lanes).tolist() == list(state["lane_offsets"]), state
        self._epoch, self._position, self._resumed = int(state["epoch"]), position, True

    def _refuse_other_data(self, state: dict[str, Any]) -> None:
        """Raise DataError, naming a file if possible, if files were added, removed or changed since a state was
        saved."""
        files, problem = self.groups.files, None
        if state.get("fingerprint") != self._fingerprint:
            had = f", expected {state['rows']:,} rows as saved" if "rows" in state else ""
            problem = f"files have come, gone or changed: found {self.rows:,} rows in {len(files):,} files{had}"
        elif state.get("contents", self._contents) != self._contents:  # states of earlier versions have none
            pairs = zip(self._contents, state["contents"], strict=True)
            step = self.groups.files_of_one
            some = files[step * next(i for i, (here, saved) in enumerate(pairs) if here != saved) :][:step]
            more = f" or one of the {len(some) - 1} behind it" if len(some) > 1 else ""
            problem = f"{some[0].path}{more} has changed since the state was saved"
        if problem is not None:
            raise DataError(
                f"reader state: {problem}; put back what was there, or begin a new run that takes over what this one "
                "has learnt: trainer.warm_start.path names this run's folder, trainer.run_dir a new one"
            )

    def _reading(self) -> Reading:
        return Reading(
            self.groups,
            self.decoder,
            self.buffers,
            lanes=self.lanes,
            window_rows=self.window_rows,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.seed,
            shuffle=self.shuffle,
            threads=self.threads,
            bad_row_counts=self.bad_row_counts,
        )

    def _deliver(self, epoch: int, position: int) -> Iterator[Batch]:
        from tessera.ctr.data.assemble import Assembler  # see TYPE_CHECKING above

        assembler = Assembler(self.schema, numbered=self.numbered)
        for period in self.periods:
            if position >= period.stop:
                continue
            with ReadAhead(self._reading(), epoch, period, position - period.first) as lanes:
                while position < period.stop:
                    stop = min(position + self.batch_size, period.stop)
                    part = position - period.first, stop - period.first
                    slices = lanes.slices(*part)
                    size = int(scheduled_rows(*part, self.lanes, self.world_size).max())
                    batch = assembler.batch(slices, size, stop)
                    self._position = position = stop
                    yield batch


def _check_settings(
    batch_size: int, rank: int, world_size: int, lanes: int, window_rows: int, threads: int, bad_rows: str
) -> None:
    counts = {"batch_size": batch_size, "lanes": lanes, "window_rows": window_rows, "threads": threads}
    for key, value in counts.items():
        if value < 1:
            raise ConfigError(f"{key}: found {value}, expected at least 1")
    if bad_rows not in ("raise", "skip"):
        raise ConfigError(f"data.bad_rows: found {bad_rows!r}; {nearest(bad_rows, ['raise', 'skip'])}")
    if world_size > lanes:
        raise ConfigError(
            f"data.lanes: found {lanes} for {world_size} ranks, expected at least as many lanes as ranks; "
            "a multiple of the ranks deals the rows evenly"
        )
    assert 0 <= rank < world_size, (rank, world_size)
