"""Run the thread that looks up ids of coming batches in host tables and copies their rows to the device.

The middle of three stages (ScaleFreeCTR, arXiv 2104.08542): the reader's threads decode batch t + 2, this one works on
batch t + 1, the device trains batch t. It takes no part in collectives: ids travel on the main thread, so that all
ranks issue collectives in one order. On a GPU its work is in a stream of its own, between events: it begins after what
the device was given before, ids ahead in one stream and steps in the default one, and the step that needs the rows
begins after it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone  # Python 3.10 has another TimeoutError besides
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch

from tessera.embedding.errors import TesseraError

T = TypeVar("T")
# The result of the work, and the event after it on the manager's stream, if there is one.
Submitted: TypeAlias = "Future[tuple[T, torch.cuda.Event | None]]"


@dataclass
class CacheStats:
    """Counts of caches. by_table: hits, misses and written_back, in rows. waited_seconds: how long steps waited for the
    threads that bring rows; busy_seconds: how long these worked."""

    by_table: dict[str, dict[str, int]]
    waited_seconds: float = 0.0
    busy_seconds: float = 0.0


class HostManager:
    """Runs submitted work in one thread, in the order of submission."""

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._thread = ThreadPoolExecutor(1, "host manager")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Tensors of one stream must outlive the steps on the other that read them: results are kept for three steps,
        # each of which has two at most (rows and sums of owners).
        self._kept: deque[Any] = deque(maxlen=6)
        self._waited_seconds = self._busy_seconds = 0.0

    def submit(self, work: Callable[[], T]) -> Submitted[T]:
        """Queue `work` behind what the thread has to do already. Returns its future."""
        given: list[torch.cuda.Event] = []
        if self._stream is not None:
            device = self._stream.device
            given = [s.record_event() for s in (torch.cuda.current_stream(device), torch.cuda.default_stream(device))]
        return self._thread.submit(self._run, work, given)

    def _run(self, work: Callable[[], T], given: list[torch.cuda.Event]) -> tuple[T, torch.cuda.Event | None]:
        began = time.perf_counter()
        ready = None
        with torch.no_grad(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for event in given:
                event.wait()
            result = work()
            if self._stream is not None:
                ready = torch.cuda.current_stream().record_event()
        self._busy_seconds += time.perf_counter() - began
        return result, ready

    def result(self, future: Submitted[T]) -> T:
        """Return the result of the work, or raise its error. Raises TesseraError if it takes longer than the limit."""
        began = time.perf_counter()
        try:
            result, ready = future.result(self._timeout_seconds)
        except NotDone:
            if future.done():
                raise
            raise TesseraError(
                f"waited {self._timeout_seconds:g} s (trainer.timeout_seconds) for the host manager's thread, "
                "which brings the rows of a batch to the cache"
            ) from None
        self._waited_seconds += time.perf_counter() - began
        if ready is not None:
            ready.wait()
        self._kept.append(result)
        return result

    def take_seconds(self) -> tuple[float, float]:
        """Return the seconds that steps waited for results, and that the thread worked, since the last call."""
        taken = self._waited_seconds, self._busy_seconds
        self._waited_seconds = self._busy_seconds = 0.0
        return taken
