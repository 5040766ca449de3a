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
from typing import Any, TypeVar

from tessera.distributed.rank import Beat, Process

T = TypeVar("T")

HEARTBEAT_SECONDS = 1.0
STALE_SECONDS = 5.0  # a rank silent for this long is taken for dead, or stopped
LEAVE_SECONDS = 1.0  # how long a rank may still hang in a collective after another one reported failure


def beat(process: Process) -> None:
    """Publish this rank's sign of life."""
    stage = process.stage
    if stage != process._beat_stage:
        process._beat_stage, process._beat_since = stage, time.monotonic()
    now, pid = time.monotonic(), os.getpid()
    mine = Beat(now, stage, now - process._beat_since, process.broken, pid, _born(pid), socket.gethostname())
    process.store.set(f"alive/{process.rank}", json.dumps(vars(mine)))


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
    name the one to blame, or the line that was reported. None: no rank did anything wrong."""
    process.broken = True
    watched = _OtherRanks(process)
    deadline = time.monotonic() + STALE_SECONDS + HEARTBEAT_SECONDS
    while time.monotonic() < deadline:
        try:
            reported = ask(watched.look, STALE_SECONDS)
        except TimeoutError:
            return silent_store(process, process.stage)
        except Exception:  # the store died with its host
            return watched.of_lost_store()
        blamed = reported or watched.gone() or watched.standing()
        if blamed:
            return blamed
        if watched.all_waited():
            break
        time.sleep(min(0.2, HEARTBEAT_SECONDS))
    return watched.slowest()


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


class _OtherRanks:
    """The view of the other ranks from a rank whose collective broke."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._ranks = [rank for rank in range(process.world_size) if rank != process.rank]
        self._beats: dict[int, Beat] = dict(process.beats)
        self._changed = {rank: time.monotonic() for rank in self._ranks}

    def look(self) -> str | None:
        """Read the others' status; return a failure that one of them has reported, else None."""
        beat(self._process)
        found = read_beats(self._process)
        for rank, one in found.items():
            if rank in self._beats and self._beats[rank].at != one.at:
                self._changed[rank] = time.monotonic()
        self._beats |= found
        store = self._process.store
        return str(store.get("failure").decode()) if store.check(["failure"]) else None

    def gone(self) -> str | None:
        """Return a message about a rank of this host whose process has ended without a report, else None."""
        for rank, one in self._beats.items():
            if one.is_here and state_of(one) is None:
                with suppress(Exception):
                    if (reported := ask(self.look, STALE_SECONDS)) is not None:
                        return reported
                return f"rank {rank} died; it was last at {one.stage}"
        return None

    def standing(self) -> str | None:
        stopped = stopped_here(self._process)
        if stopped is not None:
            return f"{stands_still(stopped)}; it was last at {self._beats[stopped].stage}"
        for rank, one in self._beats.items():
            if time.monotonic() - self._changed[rank] > STALE_SECONDS:
                self._process.to_end.add(rank)
                died = f"rank {rank} died or stands still (no heartbeat for {STALE_SECONDS:.0f} s)"
                return f"{died}; it was last at {one.stage}"
        return None

    def all_waited(self) -> bool:
        return all(rank in self._beats and self._beats[rank].broken for rank in self._ranks)

    def slowest(self) -> str | None:
        """Return a message about the rank that has been longest at its stage, among those that do not wait; None if
        none is slow."""
        busy = [rank for rank in self._beats if not self._beats[rank].broken]
        slow = max(busy, key=lambda rank: self._beats[rank].seconds, default=None)
        if slow is None or self._beats[slow].seconds < STALE_SECONDS:
            return None
        one = self._beats[slow]
        return f"rank {slow} did not answer; it has been at {one.stage} for {one.seconds:.0f} s"

    def of_lost_store(self) -> str:
        me = f"rank {self._process.rank} was at {self._process.stage}"
        if not rank_0_holds_store():
            return f"the job's store on the first host is gone; {me}"
        return f"rank 0 died: the job's store, which it held, is gone; {me}"


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
    """Return whether this rank is the one that reports for its host, when all ranks find the store lost."""
    return not any(
        0 < rank < process.rank and one.is_here and state_of(one) is not None for rank, one in process.beats.items()
    )


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
