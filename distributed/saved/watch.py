"""End a job whose save makes no progress, and name the ranks it waited for.

How long a save may take depends on the disk and on what is saved, so the collectives of the threads that write have no
limit of their own. What has one is standing still: every rank publishes how far it is, and when none of them has got
any further for `limit_seconds`, those that stand in the middle of something are named and the job ends.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from tessera.distributed.heartbeat import STALE_SECONDS, ask, silent_store, stands_still, stopped_here
from tessera.distributed.process import leave
from tessera.distributed.rank import Process

WAITING = "waiting for the other ranks"
ELSEWHERE = "busy elsewhere, it has not begun to save"
MOST_SECONDS = 10.0  # between two looks at the others


class SaveWatch:
    """Watches one rank's progress in a save. Make it on all ranks before a collective, so that each finds what the
    others publish."""

    def __init__(self, process: Process, limit_seconds: float) -> None:
        self._process, self._limit = process, limit_seconds
        self._at, self._count = ELSEWHERE, 0
        self._publish()

    def note(self, at: str) -> None:
        """Record that this rank has got further: it is at `at` now ("writing rows/user/00000-of-00002.parquet")."""
        self._at, self._count = at, self._count + 1

    @contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """Watch this block, which saves the state `name`: end the process when no rank makes progress."""
        self.note("beginning")
        self._publish()
        done = threading.Event()
        threading.Thread(target=self._watch, args=(name, done), daemon=True, name="checkpoint watch").start()
        try:
            yield
        finally:
            done.set()
            self.note(ELSEWHERE)
            with suppress(Exception):  # a job that ends has no store any more
                self._publish()

    def _watch(self, name: str, done: threading.Event) -> None:
        seen, since = None, time.monotonic()
        while not done.wait(min(MOST_SECONDS, self._limit / 10)):
            try:
                found = ask(self._everyone, self._limit)
            except TimeoutError:
                silent = silent_store(self._process, self._at)
                leave(self._process, f"error: {name} cannot be saved: {silent}")
            except Exception:  # rank 0 has gone; the others end by that, but not one that hangs in a file
                if not done.wait(STALE_SECONDS):
                    gone = f"the job's store on the first host is gone; {describe([(self._at, 0)], self._process.rank)}"
                    leave(self._process, f"error: {name} cannot be saved: {gone}")
                return
            if found != seen:
                seen, since = found, time.monotonic()
            elif time.monotonic() - since > self._limit and not done.is_set():
                stopped, limit = stopped_here(self._process), f"for {self._limit:.0f} s"
                blamed = f"{limit} {describe(found)}" if stopped is None else stands_still(stopped)
                leave(self._process, f"error: {name} cannot be saved: {blamed}")

    def _publish(self) -> None:
        if self._process.world_size > 1:
            self._process.store.set(f"saving/{self._process.rank}", json.dumps([self._at, self._count]))

    def _everyone(self) -> list[tuple[str, int]]:
        """Return [stage, number of progress notes] of each rank."""
        self._publish()
        if self._process.world_size == 1:
            return [(self._at, self._count)]
        keys = [f"saving/{rank}" for rank in range(self._process.world_size)]
        return [tuple(json.loads(text)) for text in self._process.store.multi_get(keys)]


def describe(found: Sequence[tuple[str, int]], first_rank: int = 0) -> str:
    """Return who is to blame: ranks in the middle of a file, or not there, else those that do not say they wait, else
    all."""
    at = {rank: at for rank, (at, _) in enumerate(found, first_rank)}
    holding = {rank for rank in at if at[rank] == ELSEWHERE or at[rank].startswith("writing ")}
    blamed = holding or {rank for rank in at if at[rank] != WAITING} or set(at)
    return ", ".join(f"rank {rank} has been {at[rank]}" for rank in sorted(blamed))
