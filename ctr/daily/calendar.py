"""Find the partitions that are due: those found that are not done, in order, and the next one to come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from tessera.ctr.config import Config
from tessera.ctr.daily.day_record import DayRecord
from tessera.ctr.daily.incremental import check_method
from tessera.ctr.daily.partitions import (
    Partition,
    PartitionError,
    check_content,
    find_partitions,
    fingerprint,
    is_last,
    order,
    period_of,
)
from tessera.ctr.data.day_folders import DayFolders, check_key, time_of
from tessera.ctr.data.visible import STAGING
from tessera.ctr.output_folders import check_place
from tessera.distributed.collectives import on_any_rank, on_first_rank
from tessera.distributed.process import Stopped
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

LOOK_BACK = timedelta(days=8)
SLICE_SECONDS = 1.0  # of a wait: so soon all ranks know that one of them was asked to stop


@dataclass(frozen=True)
class Due:
    """A partition to be done. path, fingerprint: None for one that is missing and to be passed over."""

    key: str
    path: str | None
    fingerprint: str | None


def for_days(config: Config) -> Config:
    """The configuration of a run over days: it goes on with its folder if there is a state.

    Raises ConfigError: no folder is named, something that is no partition, or keys that cannot go together.
    """
    daily = config.daily
    named = [("first", daily.first), ("last", daily.last), ("rollback_to", daily.rollback_to)]
    named += [("accept", key) for key in daily.accept] + [("skip", key) for key in daily.skip]
    for name, key in named:
        if key is not None:
            check_key(key, f"daily.{name}")
    if config.trainer.run_dir is None:
        raise ConfigError("trainer.run_dir is null; a run over days needs a folder that tomorrow's call finds again")
    check_place(Path(config.trainer.run_dir), "trainer.run_dir", [config.data.path])
    check_method(config)
    config.trainer.resume = config.trainer.resume or "auto"
    return config


class Calendar:
    def __init__(self, config: Config, process: Process, say: Callable[[str], None]) -> None:
        self._config, self._daily, self._process, self._say = config, config.daily, process, say
        self._folders = DayFolders.of(config.data.partition)
        self._fingerprints: dict[str, str] = {}

    def due(self, records: Sequence[DayRecord]) -> Iterator[Due]:
        """Yield partitions that are not done, in order; with daily.watch also those that are still to come.

        records: of the partitions that are done; grows while this is read.

        Raises:
            PartitionError: a partition is missing, late, repeated or changed. DataError: a folder cannot be read.
            Stopped: a rank was asked to stop while all were waiting.
        """
        while True:
            found, unfinished, stops = on_first_rank(self._process, lambda: self._look(records))
            yield from found
            newest = records[-1].partition if records else None
            if is_last(newest, self._daily.last, self._period([newest or ""])):
                return
            if not self._daily.watch:
                self._check_end(newest, unfinished, stops=stops)
                return
            if not self._wait(records):
                return

    def _look(self, records: Sequence[DayRecord]) -> tuple[list[Due], str | None, bool]:
        """Return what is due up to the first partition that is not complete; a line about that one; and whether it
        stops the job, because others behind it are complete."""
        daily = self._daily
        done = [record.partition for record in records]
        every = find_partitions(self._config.data.path, daily.first, daily.last, self._folders, daily.marker)
        unfinished = self._first_unfinished(every, {*done, *daily.skip})
        found = every if unfinished is None else every[: every.index(unfinished)]
        due = self._due(found, records, done)
        if unfinished is None:
            return due, None, False
        behind = [one for one in every[len(found) + 1 :] if one.marked and not one.written and one.key not in done]
        return due, self._line_about(unfinished), bool(behind)

    def _first_unfinished(self, found: list[Partition], passed: set[str]) -> Partition | None:
        """Return the first partition that a job is still writing, or that lacks the marker although others have one or
        daily.watch waits for it."""
        todo = [partition for partition in found if partition.key not in passed]
        if not todo:
            return None
        asks = self._daily.watch or any(partition.marked for partition in found + self._before(todo[0].key))
        return next((one for one in todo if one.written or (asks and not one.marked)), None)

    def _before(self, key: str) -> list[Partition]:
        """Return the partitions of some days before one, also those that daily.from leaves out: they show whether
        writers of this data set leave markers."""
        begin = (time_of(key) - LOOK_BACK).strftime("%Y-%m-%d")
        return find_partitions(self._config.data.path, begin, key, self._folders, self._daily.marker)

    def _line_about(self, unfinished: Partition) -> str:
        marker, key = self._daily.marker, unfinished.key
        line = f"{unfinished.path} is not complete and not trained: "
        if unfinished.written:
            line += f"a job writes below its {STAGING}, or was killed; start again when it has ended"
        else:
            line += f"it holds no {marker}, and others do; start again when it is there, or put an empty file {marker} "
            line += "into it if it is complete (daily.marker=null: none is needed)"
        return f"{line}; daily.skip=[{key}] passes it over"

    def _due(self, found: Sequence[Partition], records: Sequence[DayRecord], done: list[str]) -> list[Due]:
        daily = self._daily
        ordered = order(found, done, daily.skip, self._period(partition.key for partition in found))
        for partition in found:
            if partition.key not in daily.skip:
                check_content(partition.key, partition.path, self._fingerprint(partition), records)
        due = []
        for key, there in ordered:
            if there is None or key in daily.skip:
                due.append(Due(key, there.path if there else None, None))
                continue
            seen = self._fingerprint(there)
            same = next((one.key for one in due if one.fingerprint == seen), None)
            if same is not None:
                check_content(key, there.path, seen, [DayRecord(same, seen)])
            due.append(Due(key, there.path, seen))
        return due

    def _period(self, keys: Iterable[str]) -> timedelta:
        return period_of(keys, self._daily.period_hours)

    def _fingerprint(self, partition: Partition) -> str:
        """Return the fingerprint of a partition, computed once per process: while it waits, only new partitions are
        read again."""
        if partition.key not in self._fingerprints:
            self._fingerprints[partition.key] = fingerprint(partition, self._daily.marker)
        return self._fingerprints[partition.key]

    def _check_end(self, newest: str | None, unfinished: str | None, *, stops: bool) -> None:
        daily = self._daily
        if unfinished is not None:
            if newest is None or daily.last is not None or stops:
                raise PartitionError(unfinished)
            self._say(f"warning: {unfinished}")
            return
        where = f"{self._config.data.path}: found no partition {self._folders}"
        if newest is None:
            raise PartitionError(f"{where} from {daily.first or 'any day'} to {daily.last or 'any day'}")
        if daily.last is not None:
            raise PartitionError(f"{where} behind {newest}; expected some up to {daily.last} (daily.to)")

    def _wait(self, records: Sequence[DayRecord]) -> bool:
        """Wait until a partition is due. Returns False if the configured time has passed without one."""
        daily, began = self._daily, time.monotonic()
        self._say(f"waiting for the next partition below {self._config.data.path} (with {daily.marker})")
        while True:
            self._sleep(daily.poll_seconds)
            found = on_first_rank(
                self._process,
                lambda: (bool(self._look(records)[0]), time.monotonic() - began),  # one clock for all
            )
            if found[0]:
                return True
            if daily.wait_seconds is not None and found[1] >= daily.wait_seconds:
                newest = records[-1].partition if records else "nothing"
                self._say(
                    f"no partition behind {newest} has come with its {daily.marker} within {daily.wait_seconds:g} "
                    "seconds (daily.wait_seconds); ended"
                )
                return False

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        over = False
        while not over:
            self._process.stage = "waiting for a partition"
            time.sleep(max(0.0, min(SLICE_SECONDS, end - time.monotonic())))
            over = on_first_rank(self._process, lambda: time.monotonic() >= end)
            if any_asked_to_stop(self._process):
                raise Stopped(line=f"stopped by {self._process.stopped_by} while waiting; the same command goes on")


def any_asked_to_stop(process: Process) -> bool:
    """Return whether any rank was asked to stop; the same on every rank. Collective."""
    return on_any_rank(process.stop_asked)
