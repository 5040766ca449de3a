"""Define the order in which rows are delivered: the arithmetic of lanes, without files and without data.

One epoch is one order of all rows: the row groups in a seeded order, one after the other. It is cut into a
fixed number of lanes of equal length, and lanes are dealt to ranks in contiguous blocks. Batch k takes rows
[k * batch_size, (k + 1) * batch_size) of the round over the lanes: row 0 of every lane, row 1 of every lane,
and so on. Nothing of this depends on the number of ranks, and one integer, the number of rows delivered so
far, is the exact position of all lanes, also under another batch size or another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# First word of the seed of each random order, so that no two of them share a stream.
ROW_GROUPS, WINDOW = 1, 2
# Version of the order of rows. A position means other rows in another version, so states record theirs.
ORDER = 2


def seeded_order(n: int, *key: int) -> np.ndarray:
    """Return a random order of range(n) as int64 [n], a function of (n, key) alone.

    The raw output of a bit generator is fixed by numpy's compatibility policy, the methods of Generator are
    not; a saved position must mean the same rows after an upgrade of numpy. So the order is that of random
    keys, with the element itself in the low bits to make them distinct.
    """
    low_bits = np.uint64(max(1, (n - 1).bit_length()))
    words = np.array([k & (2**64 - 1) for k in key], dtype=np.uint64).view(np.uint32)
    keys = np.random.PCG64(np.random.SeedSequence(words.tolist())).random_raw(n)
    keys >>= low_bits
    keys <<= low_bits
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << low_bits) - np.uint64(1)
    return keys.view(np.int64)


def lane_starts(rows: int, lanes: int) -> np.ndarray:
    """Return the start of each lane in the epoch's order, int64 [lanes + 1]; the first rows % lanes are a row
    longer."""
    sizes = rows // lanes + (np.arange(lanes) < rows % lanes)
    return np.concatenate([[0], np.cumsum(sizes)])


def lane_offsets(position: int, lanes: int) -> np.ndarray:
    """Return the rows that each lane has delivered when all together have delivered `position`; int64 [lanes]."""
    return (position + lanes - 1 - np.arange(lanes)) // lanes


def rank_bounds(world_size: int, lanes: int) -> np.ndarray:
    """Return the first lane of each rank, int64 [world_size + 1]: rank r owns lanes bounds[r] to bounds[r + 1] - 1."""
    return np.arange(world_size + 1) * lanes // world_size


def scheduled_rows(position: int, stop: int, lanes: int, world_size: int) -> np.ndarray:
    """Return the rows that each rank delivers between two positions, int64 [world_size]."""
    per_lane = lane_offsets(stop, lanes) - lane_offsets(position, lanes)
    return np.diff(np.concatenate([[0], np.cumsum(per_lane)])[rank_bounds(world_size, lanes)])


@dataclass(frozen=True)
class Span:
    """The rows [first, stop) of a row group."""

    group: int
    first: int
    stop: int


# Rows of a row group that are decoded at once, at least one window: enough to hide the cost of a call per column,
# few enough for a column to stay in the cache.
CHUNK_ROWS = 65536


def window_step(group_rows: int, window_rows: int) -> int:
    """Return the rows per window of a row group larger than a window: equal parts, so that none is tiny."""
    return -(-group_rows // -(-group_rows // window_rows))


def chunk_rows(group_rows: int, window_rows: int) -> int:
    """Return the rows per chunk of a row group: a whole number of windows."""
    step = window_step(group_rows, window_rows)
    return step * max(1, CHUNK_ROWS // step)


def lane_chunks(
    order: np.ndarray, rows: np.ndarray, start: int, stop: int, window_rows: int
) -> Iterator[list[list[Span]]]:
    """Return the windows of the lane [start, stop) of the epoch's order, in chunks to be decoded together.

    order: int64 [groups] the permuted row groups; rows: int64 [groups] rows of each, in their own order. A window
    has at most `window_rows` rows and is given by its spans. It is part of one large row group, and the chunk then
    has its neighbours, or it is made of several small ones, and is a chunk by itself; so no window waits for the
    rest of a decoded row group. Rows are shuffled inside windows.
    """
    ends = np.cumsum(rows[order])
    place = int(np.searchsorted(ends, start, side="right"))
    small: list[Span] = []
    small_rows = 0
    while start < stop:
        group = int(order[place])
        group_rows, end = int(rows[group]), int(ends[place])
        begin = end - group_rows
        first, last = start - begin, min(stop, end) - begin
        large = group_rows > window_rows
        if small and (large or small_rows + last - first > window_rows):
            yield [small]
            small, small_rows = [], 0
        if large:
            yield from _large_chunks(group, first, last, group_rows, window_rows)
        elif last > first:
            small.append(Span(group, first, last))
            small_rows += last - first
        start, place = begin + last, place + 1
    if small:
        yield [small]


def _large_chunks(group: int, first: int, stop: int, group_rows: int, window_rows: int) -> Iterator[list[list[Span]]]:
    step, chunk = window_step(group_rows, window_rows), chunk_rows(group_rows, window_rows)
    for begin in range(first // chunk * chunk, stop, chunk):
        cuts = range(begin, min(begin + chunk, stop), step)
        spans = [Span(group, max(first, cut), min(stop, cut + step)) for cut in cuts if cut + step > first]
        yield [[span] for span in spans]
