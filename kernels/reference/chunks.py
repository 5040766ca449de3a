"""Rows stored in chunks, in torch: the rows of a request grouped by the chunk that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def by_chunk(chunks: Sequence[Tensor], rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (chunk, positions in `rows`, rows inside the chunk) for every chunk asked for; -1 is left out.

    Raises IndexError for a row beyond the last chunk.
    """
    if rows.numel() == 0 or int(rows.max()) < 0:
        return
    total = len(chunks) * chunks[0].shape[0] if chunks else 0
    if int(rows.max()) >= total:
        raise IndexError(f"rows: expected below {total}, found {int(rows.max())}")
    size = chunks[0].shape[0]
    number = torch.where(rows >= 0, rows // size, -1)
    order = number.argsort(stable=True)
    numbers, counts = torch.unique_consecutive(number[order], return_counts=True)
    for chunk, positions in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
        if chunk >= 0:
            yield chunks[chunk], positions, rows[positions] & (size - 1)
