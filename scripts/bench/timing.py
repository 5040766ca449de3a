"""Measure time in benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternate(works: dict[K, Callable[[], object]], rounds: int, calls: int = 1) -> dict[K, float]:
    """Return median seconds per call of each of several works, which take turns so that disturbances affect them alike.
    Each is called twice before."""
    for work in works.values():
        work(), work()
    times: dict[K, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(lambda work=work: [work() for _ in range(calls)]) / calls)
    return {name: statistics.median(values) for name, values in times.items()}
