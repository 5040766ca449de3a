"""Exchange signs of life between the ranks of a job, and find the rank to blame when a collective breaks.

Each rank publishes again and again that it lives and the stage it is in. When a collective breaks on a rank, it says
so, too: all ranks that waited in vain have done nothing wrong. To blame is who is gone, who stands still, or who has
not come back from its stage.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from tessera.distributed.rank import Beat, Process

T = TypeVar("T")

HEARTBEAT_SECONDS = 1.0
STALE_SECONDS = 5.0  # a rank silent for this long is taken for dead, or stopped
MOST_WATCHERS = 3  # for so many that die just before they find out, one after the other, a rank waits
LEAVE_SECONDS = 1.0  # how long a rank may still hang in a collective after another one reported failure


def beat(process: Process) -> Beat:
    """Publish this rank's sign of life, and return it."""
    stage = process.stage
    if stage != process._beat_stage:
        process._beat_stage, process._beat_since = stage, time.monotonic()
    now, pid = time.monotonic(), os.getpid()
    mine = Beat(now, stage, now - process._beat_since, process.broken, pid, _born(pid), socket.gethostname())
    process.store.set(f"alive/{process.rank}", json.dumps(vars(mine)))
    return mine


def keep_beating(process: Process) -> None:
    """Publish signs of life until the rank ends; end it when another one has reported why the job fails."""
    failed_at = None
    while not process._ended.wait(HEARTBEAT_SECONDS):
        try:
            beat(process)
            if failed_at is None and process.store.check(["failure"]):
                failed_at = time.monotonic()
        except Exception:
            return  # the store is gone; the main thread's collectives fail by themselves
        if failed_at is not None and time.monotonic() - failed_at > LEAVE_SECONDS:
            os._exit(1)  # another rank reported why; this one hangs in a collective that will never complete


def find_failed_rank(process: Process) -> str | None:
    """Wait until another rank reports, is gone or stands still, or all others have said that they waited, too; then
    name the one to blame, or the line that was reported. None: no rank did anything wrong.

    The first rank that comes here watches all others and publishes what it finds; the rest look at that, at itself and
    at their own host, so that the store is read as often as there are ranks, not as there are pairs of them. If it
    dies, the next one takes its place.
    """
    process.broken, process.beside = True, running_here(process)
    search = _Search(process)
    end = time.monotonic() + MOST_WATCHERS * (2 * STALE_SECONDS + HEARTBEAT_SECONDS)
    while time.monotonic() < end:
        try:
            found = ask(search.look, STALE_SECONDS)
        except TimeoutError:
            return silent_store(process, process.stage)
        except Exception:  # the store died with its host
            return of_lost_store(process)
        found = found or search.on_this_host() or search.among_all()
        if found is not None:
            search.publish(found)
            return found.line
        time.sleep(min(0.2, HEARTBEAT_SECONDS))
    return None


def ask(question: Callable[[], T], seconds: float) -> T:
    """Return the answer to a question to the store, in limited time: the store's host may stand still and never answer.

    Raises:
        TimeoutError: there was none within the time.
    """
    answer: list[Any] = []

    def put() -> None:
        try:
            answer.append((question(), None))
        except Exception as error:
            answer.append((None, error))

    thread = threading.Thread(target=put, daemon=True, name="question to the store")
    try:
        thread.start()
    except RuntimeError:  # there is no memory or no thread left
        return question()
    thread.join(seconds)
    if not answer:
        raise TimeoutError
    value: T
    value, error = answer[0]
    if error is not None:
        raise error
    return value


@dataclass(frozen=True)
class _Verdict:
    """Who is to blame, as a line; None if no rank did anything wrong. stands_still: a rank that lives and must be
    ended."""

    line: str | None
    stands_still: int | None = None


class _Search:
    """The view of the other ranks from a rank whose collective broke."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._here = {rank: one for rank, one in process.beats.items() if one.is_here}
        self._watchers: list[int] = []  # the last one watches, those before it are silent
        self._next = True  # a watcher is to be found
        self._seen = ("", 0.0)  # the watcher's last sign of life, and since when
        self._all: _AllRanks | None = None  # if this rank is the watcher

    def look(self) -> _Verdict | None:
        """Ask the store what others have found, and for the watcher's sign of life; as the watcher, for everyone's."""
        beat(self._process)
        found = self._reported()
        if found is not None:
            return found
        store, me = self._process.store, self._process.rank
        if self._next:
            name = f"watcher/{len(self._watchers)}"
            self._watchers.append(int(store.compare_set(name, "", str(me))))
            self._next, self._seen = False, ("", time.monotonic())
            if self._watchers[-1] == me:
                self._all = _AllRanks(self._process, self._watchers[:-1])
        if self._all is not None:
            self._all.look()
            return None
        text = store.get(f"alive/{self._watchers[-1]}").decode()
        if text != self._seen[0]:
            self._seen = text, time.monotonic()
        self._next = time.monotonic() - self._seen[1] > STALE_SECONDS
        return None

    def on_this_host(self) -> _Verdict | None:
        """Return who of this host has ended without a report, or was stopped, else None."""
        for rank, one in self._here.items():
            if state_of(one) is None:
                with suppress(Exception):
                    if (reported := ask(self._reported, STALE_SECONDS)) is not None:
                        return reported
                return _Verdict(f"rank {rank} died; it was last at {self._stage_of(rank)}")
        stopped = stopped_here(self._process)
        if stopped is not None:
            return _Verdict(f"{stands_still(stopped)}; it was last at {self._stage_of(stopped)}")
        return None

    def among_all(self) -> _Verdict | None:
        """Return what the watcher concludes, if this rank is it; else None."""
        return self._all.conclude() if self._all is not None else None

    def publish(self, found: _Verdict) -> None:
        """Tell the others what was found; end neighbours that stand still."""
        if found.stands_still is not None:
            self._process.to_end.add(found.stands_still)
        if self._all is not None:
            with suppress(Exception):
                ask(lambda: self._process.store.set("verdict", json.dumps(vars(found))), STALE_SECONDS)

    def _reported(self) -> _Verdict | None:
        store = self._process.store
        if store.check(["verdict"]):
            return _Verdict(**json.loads(store.get("verdict")))
        return _Verdict(store.get("failure").decode()) if store.check(["failure"]) else None

    def _stage_of(self, rank: int) -> str:
        """Return the stage that a rank has published last."""
        with suppress(Exception):
            return str(json.loads(ask(lambda: self._process.store.get(f"alive/{rank}"), STALE_SECONDS))["stage"])
        return self._process.beats[rank].stage


class _AllRanks:
    """All other ranks, as the watcher sees them. silent: those that watched before it and have gone silent since, which
    are not the cause."""

    def __init__(self, process: Process, silent: list[int]) -> None:
        self._process = process
        self._beats: dict[int, Beat] = dict(process.beats)
        others = [rank for rank in range(process.world_size) if rank != process.rank]
        self._ranks = sorted(others, key=lambda rank: rank in silent)
        self._changed = dict.fromkeys(others, time.monotonic())
        self._end = time.monotonic() + STALE_SECONDS + HEARTBEAT_SECONDS

    def look(self) -> None:
        """Read the others' status."""
        found = read_beats(self._process)
        for rank, one in found.items():
            if rank in self._beats and self._beats[rank].at != one.at:
                self._changed[rank] = time.monotonic()
        self._beats |= found

    def conclude(self) -> _Verdict | None:
        """Return who is to blame once that is known, else None."""
        for rank in self._ranks:
            if rank in self._beats and time.monotonic() - self._changed[rank] > STALE_SECONDS:
                died = f"rank {rank} died or stands still (no heartbeat for {STALE_SECONDS:.0f} s)"
                return _Verdict(f"{died}; it was last at {self._beats[rank].stage}", rank)
        all_waited = all(rank in self._beats and self._beats[rank].broken for rank in self._ranks)
        return _Verdict(self._slowest()) if all_waited or time.monotonic() > self._end else None

    def _slowest(self) -> str | None:
        """Return a message about the rank that has been longest at its stage, among those that do not wait; None if
        none is slow."""
        busy = [rank for rank in self._beats if not self._beats[rank].broken]
        slow = max(busy, key=lambda rank: self._beats[rank].seconds, default=None)
        if slow is None or self._beats[slow].seconds < STALE_SECONDS:
            return None
        one = self._beats[slow]
        return f"rank {slow} did not answer; it has been at {one.stage} for {one.seconds:.0f} s"


def read_beats(process: Process) -> dict[int, Beat]:
    """Return the last sign of life of every other rank."""
    keys = {rank: f"alive/{rank}" for rank in range(process.world_size) if rank != process.rank}
    if not process.store.check(list(keys.values())):
        keys = {rank: key for rank, key in keys.items() if process.store.check([key])}
    texts = process.store.multi_get(list(keys.values())) if keys else []
    return {rank: Beat(**json.loads(text)) for rank, text in zip(keys, texts, strict=True)}


def stopped_here(process: Process) -> int | None:
    """Return a rank of this host whose process was stopped; None if there is none."""
    stopped = (rank for rank, one in process.beats.items() if one.is_here and (state_of(one) or "") in ("T", "t"))
    return next(stopped, None)


def stands_still(rank: int) -> str:
    return f"rank {rank} stands still: its process was stopped (SIGSTOP)"


def of_lost_store(process: Process) -> str:
    """Return a message for a store that is gone."""
    me = f"rank {process.rank} was at {process.stage}"
    if not rank_0_holds_store():
        return f"the job's store on the first host is gone; {me}"
    return f"rank 0 died: the job's store, which it held, is gone; {me}"


def silent_store(process: Process, at: str) -> str:
    """Return a message for a store that does not answer, from a rank that is at `at`."""
    me = f"rank {process.rank} was at {at}"
    if not rank_0_holds_store() or process.is_main:
        return f"the job's store on the first host does not answer; {me}"
    return f"rank 0 stands still: the job's store, which it holds, does not answer; {me}"


def rank_0_holds_store() -> bool:
    """Return whether the store lives in rank 0 and ends with it; otherwise the launcher holds it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def let_other_ranks_leave(process: Process) -> None:
    """Keep the store that rank 0 holds for as long as the others need to learn from it that the job has failed."""
    end = time.monotonic() + STALE_SECONDS + LEAVE_SECONDS
    while process.is_main and process.beats and rank_0_holds_store() and time.monotonic() < end:
        if all(one.is_here and state_of(one) is None for one in process.beats.values()):
            return
        time.sleep(0.05)


def speaks_for_host(process: Process) -> bool:
    """Return whether this rank is the one that reports for its host, when all ranks find the store lost. One of a lower
    number may have done so and left already: what counts is who was there when the collective broke."""
    beside = running_here(process) if process.beside is None else process.beside
    return not any(0 < rank < process.rank for rank in beside)


def running_here(process: Process) -> set[int]:
    """Return the other ranks of this host whose processes are running now."""
    return {rank for rank, one in process.beats.items() if one.is_here and state_of(one) not in (None, "T", "t")}


def end_neighbours(process: Process) -> None:
    """Kill ranks of this host that stand still: a launcher would wait half a minute before it does the same."""
    for rank, one in process.beats.items():
        if one.is_here and (state := state_of(one)) is not None and (state in ("T", "t") or rank in process.to_end):
            with suppress(OSError):
                os.kill(one.pid, signal.SIGKILL)


def state_of(one: Beat) -> str | None:
    """Return Linux's letter for the state of a rank's process on this host: T for stopped; None if it has ended. On
    other systems "?"."""
    found = _stat(one.pid)
    if not os.path.isdir("/proc/self"):
        return "?"
    return found[0] if found and found[0] != "Z" and found[19] == one.born else None


def _born(pid: int) -> str:
    found = _stat(pid)
    return found[19] if found else ""


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the state on; [] if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
