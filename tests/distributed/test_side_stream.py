"""The order of work on a GPU's two streams, and how long memory is held, without a GPU: streams are pretended."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch

from tessera.distributed.host_manager import HostManager
from tessera.distributed.side_stream import SideStream

STEPS = 12


class Stream:
    """Work in order; an event is what has to be done before it, on this stream and on all that it waited for."""

    def __init__(self, device=None):
        self.device, self.before = device, set()

    def do(self, work: str) -> set[str]:
        """Queue work. Returns all that is done when it begins."""
        before = set(self.before)
        self.before.add(work)
        return before

    def record_event(self) -> set[str]:
        return set(self.before)

    def wait_event(self, event: set[str]) -> None:
        self.before |= event

    def wait_stream(self, other: Stream) -> None:
        self.before |= other.before


class Event(set):
    def __init__(self, before: set[str], current: list[Stream]):
        super().__init__(before)
        self._current = current

    def wait(self) -> None:
        self._current[-1].before |= self


class Batch:
    """What a step uses, in memory of the side stream."""


@pytest.fixture
def streams(monkeypatch):
    steps, current = Stream(), []

    @contextlib.contextmanager
    def stream(one):
        current.append(one)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: steps)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return steps, current


def test_copies_run_beside_steps_and_memory_outlives_them(streams):
    """A step begins when its batch is there; the next copy does not wait for that step or the one before; and whatever
    is freed belongs to a step that is over for all that is copied later."""
    steps, current = streams
    ahead, alive = SideStream(torch.device("cuda", 0)), {}

    def copy(number):
        with ahead.queued():
            freed = [n for n, batch in alive.items() if batch() is None]
            done = current[-1].do(f"copy {number}")
        assert {f"step {n}" for n in freed} <= done, "memory of a batch is given away before its step is over"
        assert f"step {number - 1}" not in done and f"step {number - 2}" not in done
        batch = Batch()
        alive[number] = weakref.ref(batch)
        return batch

    batch = copy(0)
    for number in range(STEPS):
        ahead.begin_step(batch)
        batch = copy(number + 1)
        assert f"copy {number}" in steps.do(f"step {number}")
    assert sum(one() is not None for one in alive.values()) <= 4 and alive[number]() is not None


def test_rows_are_brought_after_both_streams(streams, monkeypatch):
    """Slots that are written back were changed by steps, in one stream; the ids were sent in the other."""
    steps, current = streams
    side = Stream()
    monkeypatch.setattr(Stream, "record_event", lambda one: Event(one.before, current))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    manager, ahead = HostManager(torch.device("cuda", 0), 10.0), SideStream(torch.device("cuda", 0))
    ahead._stream = side
    steps.do("step 1")
    with ahead.queued():
        side.do("ids 2")
        future = manager.submit(lambda: current[-1].do("rows 2"))
        future.result(10)
    current.append(steps)
    assert manager.result(future) == {"step 1", "ids 2"}
    assert {"step 1", "ids 2", "rows 2"} <= steps.before


def test_on_the_cpu_nothing_is_held():
    ahead, batch = SideStream(torch.device("cpu")), Batch()
    with ahead.queued():
        ahead.begin_step(batch)
    there = weakref.ref(batch)
    del batch
    assert there() is None
