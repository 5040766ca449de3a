"""Who is to blame when a collective breaks, for many simulated ranks on a clock of their own, and what asking costs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tessera.distributed import heartbeat
from tessera.distributed.rank import Process

ROUND = 0.2  # seconds between two looks


class CountingStore:
    """A store that counts the keys that are read."""

    def __init__(self) -> None:
        self._store, self.read = dist.HashStore(), 0

    def __getattr__(self, name: str):
        def call(*arguments):
            if name != "set":
                self.read += len(arguments[0]) if isinstance(arguments[0], list) else 1
            return getattr(self._store, name)(*arguments)

        return call


class Job:
    """Ranks on hosts of their own that look at each other in turn; whoever is not among `looking` has died."""

    def __init__(self, clock, ranks: int) -> None:
        self.clock, self.store = clock, CountingStore()
        self.processes = [Process(rank, 0, ranks, torch.device("cpu"), self.store) for rank in range(ranks)]
        for process in self.processes:
            process.stage = "step 20: sum"
        first = [replace(heartbeat.beat(process), host=f"host{process.rank}") for process in self.processes]
        for process in self.processes:
            process.beats = {rank: one for rank, one in enumerate(first) if rank != process.rank}
        self.read = [0] * ranks
        self.rounds = [0] * ranks
        self.searches: dict[int, heartbeat._Search] = {}

    def round(self, broken, beating=()) -> dict[int, str | None]:
        """One look of each rank whose collective broke, and a sign of life of those that are busy; who found what."""
        self.clock.now += ROUND
        found = {}
        for rank in beating:
            heartbeat.beat(self.processes[rank])
        for rank in broken:
            if rank not in self.searches:
                self.processes[rank].broken = True
                self.searches[rank] = heartbeat._Search(self.processes[rank])
            search, before = self.searches[rank], self.store.read
            verdict = search.look() or search.on_this_host() or search.among_all()
            self.read[rank] += self.store.read - before
            self.rounds[rank] += 1
            if verdict is not None:
                search.publish(verdict)
                found[rank] = verdict.line
        return found

    def until_all_know(self, broken, beating=(), most=200) -> set[str | None]:
        left, said = list(broken), set()
        for _ in range(most):
            found = self.round(left, beating)
            said |= set(found.values())
            left = [rank for rank in left if rank not in found]
            if not left:
                return said
        raise AssertionError(f"ranks {left} found nothing in {most} rounds")


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(now=1000.0)

    def sleep(seconds: float) -> None:
        now.now += seconds

    monkeypatch.setattr(heartbeat, "time", types.SimpleNamespace(monotonic=lambda: now.now, sleep=sleep))
    return now


@pytest.mark.parametrize("ranks", [64, 256])
def test_a_silent_rank_costs_each_rank_a_few_reads_a_round(clock, ranks):
    """Whatever the number of ranks: one of them reads everyone's status, the rest what it finds."""
    job = Job(clock, ranks)
    others = [rank for rank in range(ranks) if rank != 5]
    said = job.until_all_know(others)
    assert said == {"rank 5 died or stands still (no heartbeat for 5 s); it was last at step 20: sum"}
    assert all(5 in job.processes[rank].to_end for rank in others)
    watcher = max(range(ranks), key=lambda rank: job.read[rank])
    assert job.rounds[watcher] > 20
    assert job.read[watcher] <= (2 * ranks + 2) * job.rounds[watcher]
    assert all(job.read[rank] <= 3 * job.rounds[rank] + 1 for rank in others if rank != watcher)
    assert sum(job.read) <= 6 * sum(job.rounds)


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_watcher_that_dies_is_followed_by_another_and_not_blamed(clock, deaths):
    """Nor does it matter that its number is below that of the rank that was silent first."""
    job = Job(clock, 8)
    alive = [0, 1, 2, 3, 4, 6, 7]
    for _ in range(deaths):
        for _ in range(10):
            assert not job.round(alive)
        alive = alive[1:]  # ranks look in their order, so the first is the watcher
        while len(job.searches[alive[0]]._watchers) == 8 - 1 - len(alive):
            assert not job.round(alive)
    said = job.until_all_know(alive)
    assert said == {"rank 5 died or stands still (no heartbeat for 5 s); it was last at step 20: sum"}


def test_a_rank_that_hangs_but_lives_is_named_by_its_stage(clock):
    job = Job(clock, 16)
    job.processes[9].stage = "step 20: reading"
    said = job.until_all_know([rank for rank in range(16) if rank != 9], beating=[9])
    (line,) = said
    assert line.startswith("rank 9 did not answer; it has been at step 20: reading for ")


def test_nobody_is_blamed_where_all_waited(clock):
    job = Job(clock, 16)
    assert job.until_all_know(range(16)) == {None}
    assert max(job.rounds) <= 2


def test_what_a_rank_reports_is_what_the_others_say(clock):
    job = Job(clock, 16)
    others = [rank for rank in range(16) if rank != 3]
    assert not job.round(others, beating=[3])
    job.store.set("failure", "rank 3, step 20: a bug")
    assert job.until_all_know(others) == {"rank 3, step 20: a bug"}


def test_a_rank_of_this_host_that_ended_is_named_at_once_by_its_neighbour(clock):
    """Not only by the watcher, which may be on another host."""
    job = Job(clock, 16)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    neighbour = job.processes[7].beats
    neighbour[6] = replace(neighbour[6], host=socket.gethostname(), pid=ended.pid)
    neighbour[8] = replace(neighbour[8], host=socket.gethostname(), pid=os.getpid())
    found = job.round([rank for rank in range(16) if rank not in (6, 8)], beating=[8])
    assert found == {7: "rank 6 died; it was last at step 20: sum"}


def test_nobody_looks_for_ever(clock):
    """Even if every watcher dies before it finds out."""
    job = Job(clock, 8)
    for number in range(4 * heartbeat.MOST_WATCHERS):
        job.store.set(f"watcher/{number}", str(number % 6 + 1))
    began = clock.now
    assert heartbeat.find_failed_rank(job.processes[7]) is None
    assert clock.now - began < heartbeat.MOST_WATCHERS * 11 + 1


def test_one_rank_of_a_host_speaks_where_the_store_is_lost(clock):
    """Also if the one that spoke has left before the other asks whether to."""
    job = Job(clock, 4)
    spoke = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    second = job.processes[2]
    born = heartbeat._born(spoke.pid)
    second.beats[1] = replace(second.beats[1], host=socket.gethostname(), pid=spoke.pid, born=born)
    job.store.set("failure", "the store is lost behind this")
    heartbeat.find_failed_rank(second)
    spoke.communicate(b"\n")
    assert not heartbeat.speaks_for_host(second)
    second.beside = None
    assert heartbeat.speaks_for_host(second)
