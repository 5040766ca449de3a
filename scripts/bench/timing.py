"""Measure time in benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _repeat(work: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        work()


def alternate(works: Mapping[K, Callable[[], object]], rounds: int, calls: int = 1) -> dict[K, float]:
    """Return median seconds per call of each of several works, which take turns so that disturbances affect them alike.
    Each is called twice before."""
    for work in works.values():
        work(), work()
    times: dict[K, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(partial(_repeat, work, calls)) / calls)
    return {name: statistics.median(values) for name, values in times.items()}
