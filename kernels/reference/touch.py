"""Update time and count per row in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tessera.kernels.reference.chunks import by_chunk


def touch(chunks: Sequence[Tensor], rows: Tensor, now: Tensor, counts: Tensor | None) -> None:
    now = now.expand(rows.numel())
    for chunk, positions, local in by_chunk(chunks, rows):
        last_seen, count = chunk[local, 0], chunk[local, 1]
        time = now[positions]
        chunk[local, 0] = torch.where(count == 0, time, torch.maximum(last_seen, time))
        chunk[local, 1] = count + (1 if counts is None else counts[positions])


def expired(chunks: Sequence[Tensor], limit: int, begin: int, end: int) -> Tensor:
    found = [torch.empty(0, dtype=torch.int64, device=chunks[0].device)]
    for first, block in _slices(chunks, begin, end):
        old = (block[:, 1] > 0) & (block[:, 0] <= limit)
        found.append(old.nonzero().flatten() + first)
    return torch.cat(found)


def coldest(chunks: Sequence[Tensor], column: int, k: int, begin: int, end: int, keep: Tensor | None) -> Tensor:
    rows = torch.arange(begin, end, device=chunks[0].device)
    blocks = [block[:, :2] for _, block in _slices(chunks, begin, end)]
    both = torch.cat(blocks) if blocks else chunks[0].new_empty((0, 2))
    candidate = both[:, 1] > 0
    if keep is not None:
        inside = keep[(keep >= begin) & (keep < end)]
        candidate[inside - begin] = False
    rows, both = rows[candidate], both[candidate]
    # The last sort decides; the earlier ones break its ties because all are stable.
    order = both[:, 1 - column].argsort(stable=True)
    order = order[both[order, column].argsort(stable=True)]
    return rows[order[:k]]


def _slices(chunks: Sequence[Tensor], begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, its part of a chunk) for the rows [begin, end)."""
    size = chunks[0].shape[0]
    while begin < end:
        stop = min(end, (begin // size + 1) * size)
        yield begin, chunks[begin // size][begin % size : (stop - 1) % size + 1]
        begin = stop
