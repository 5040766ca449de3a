"""K-means whose result is a function of the vectors and the seed: neither threads nor the cut into blocks change a bit.

Vectors are compared with centroids in blocks of one shape, each computed by one thread, and sums are taken in the order
of the vectors. On another type of CPU a vector that lies between two centroids may go to the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

BLOCK = 1024  # rows of a product; the last block is filled up, so that every row is computed alike
FIRST = 32  # vectors for each centroid, among which the first centroids are drawn
AT_LEAST = 4096  # vectors among which they are drawn, whatever the number of centroids

Starts = Callable[[int], object]  # what is done with the block that begins at a row


class Workers:
    """Threads that compute a block each."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def over(self, rows: int, work: Starts) -> None:
        """Call `work` with the first row of every block of `rows`, in any order."""
        for _ in self._pool.map(work, range(0, rows, BLOCK)):
            pass


@contextmanager
def workers(threads: int) -> Iterator[Workers]:
    """Yield so many threads. Inside, a product of torch takes one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # New threads do not take the number over from the one that starts them.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield Workers(pool)
    finally:
        torch.set_num_threads(before)


def nearest(x: np.ndarray, centroids: np.ndarray, by: Workers) -> np.ndarray:
    """Return the number of the nearest centroid, the first of equal ones: int32 [n] of x float32 [n, d] and centroids
    float32 [k, d]."""
    found = np.empty(len(x), np.int32)
    turned = torch.from_numpy(np.ascontiguousarray(centroids)).t().contiguous()
    half = (np.square(centroids, dtype=np.float64).sum(1) / 2).astype(np.float32)

    def block(first: int) -> None:
        rows = x[first : first + BLOCK]
        filled = torch.zeros(BLOCK, x.shape[1])
        filled[: len(rows)] = torch.from_numpy(rows)
        # |x - c|^2 / 2 without |x|^2, which is the same for all centroids.
        scores = half - (filled @ turned).numpy()
        found[first : first + BLOCK] = scores[: len(rows)].argmin(1)

    by.over(len(x), block)
    return found


def k_means(x: np.ndarray, k: int, seed: int, iterations: int, by: Workers) -> np.ndarray:
    """Return centroids float32 [k, d] of x float32 [n, d] by Lloyd's iterations from a start by k-means++ (Arthur and
    Vassilvitskii, 2007).

    There are fewer than k where x has fewer different vectors. Iterations end early when no vector changes its
    centroid. A centroid that no vector is near to moves to the vector farthest from its own. The first rows of x are
    the ones that the start is drawn from: they must be a random choice of all.
    """
    centroids = _first_centroids(x[: max(FIRST * k, AT_LEAST)], k, np.random.default_rng(seed), by)
    before: np.ndarray | None = None
    for _ in range(iterations):
        codes = nearest(x, centroids, by)
        if before is not None and np.array_equal(codes, before):
            break
        centroids, before = _means(x, codes, centroids), codes
    return centroids


def _first_centroids(x: np.ndarray, k: int, draw: np.random.Generator, by: Workers) -> np.ndarray:
    """Draw vectors one by one, each with a chance in proportion to its squared distance from the nearest drawn one."""
    chosen = [int(draw.integers(len(x)))]
    least = np.full(len(x), np.inf)

    def block(first: int) -> None:
        rows = slice(first, first + BLOCK)
        apart = np.square(x[rows] - x[chosen[-1]], dtype=np.float64).sum(1)
        np.minimum(least[rows], apart, out=least[rows])

    while len(chosen) < k:
        by.over(len(x), block)
        until = np.cumsum(least)
        if until[-1] <= 0:
            break
        at = np.searchsorted(until, draw.random() * until[-1], side="right")
        chosen.append(int(min(at, len(x) - 1)))
    return x[chosen].copy()


def _means(x: np.ndarray, codes: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    counts = np.bincount(codes, minlength=len(centroids))
    used = np.flatnonzero(counts)
    order = np.argsort(codes, kind="stable")
    starts = (np.cumsum(counts) - counts)[used]
    moved = centroids.copy()
    moved[used] = np.add.reduceat(x[order], starts, axis=0, dtype=np.float64) / counts[used, None]
    unused = np.flatnonzero(counts == 0)
    if len(unused):
        apart = np.square(x - moved[codes], dtype=np.float64).sum(1)
        far = np.argsort(-apart, kind="stable")[: len(unused)]
        far = far[apart[far] > 0]
        moved[unused[: len(far)]] = x[far]
    return moved
