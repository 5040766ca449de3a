"""Track when a row was last seen and how often: kept per row, read in bounded slices to find rows to evict.

The chunks here are int64 [chunk_rows, 2 or more]: column 0 is the time last seen (in the caller's unit),
column 1 the count; further columns belong to the caller. A row whose count is 0 is not in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_chunks, check_index
from tessera.kernels.reference import touch as reference

LAST_SEEN, COUNT = 0, 1


def touch(chunks: Sequence[Tensor], rows: Tensor, now: int | Tensor, counts: Tensor | None = None) -> None:
    """Set the time last seen to max(itself, now) and add counts (1 each if None), in place.

    rows: int64 [n], distinct, -1 is skipped; now: one number or int64 [n]; counts: int64 [n]. A row that is
    not in use (count 0) takes `now` whatever its old time was. Raises ValueError for wrong dtypes or
    shapes, IndexError for a row out of range.
    """
    check_index("rows", rows)
    check_chunks(chunks, 2, torch.int64)
    times = torch.full((1,), now, dtype=torch.int64, device=rows.device) if isinstance(now, int) else now
    check_index("now", times)
    if times.numel() not in (1, rows.numel()):
        raise ValueError(f"now: expected one or {rows.numel()} elements, found {times.numel()}")
    if counts is not None:
        check_index("counts", counts)
        if counts.numel() != rows.numel():
            raise ValueError(f"counts: expected {rows.numel()} elements, found {counts.numel()}")
    ops = backend.ops_for(rows) or reference
    ops.touch(chunks, rows, times, counts)


def expired(chunks: Sequence[Tensor], now: int, ttl: int, begin: int, end: int) -> Tensor:
    """Return rows in use of [begin, end) with now - last seen >= ttl: int64 [k], ascending.

    Walk the table in slices to bound the work of one call. Raises IndexError if the slice leaves the table.
    """
    check_chunks(chunks, 2, torch.int64)
    _check_slice(chunks, begin, end)
    if not chunks:
        return torch.empty(0, dtype=torch.int64)
    ops = backend.ops_for(chunks[0]) or reference
    return ops.expired(chunks, now - ttl, begin, end)


def coldest(chunks: Sequence[Tensor], column: int, k: int, begin: int, end: int, keep: Tensor | None = None) -> Tensor:
    """Return the k rows in use of [begin, end) with the smallest value in `column`: int64 [<= k], coldest first.

    column LAST_SEEN gives the least recently used rows, COUNT the least frequently used; ties are broken by
    the other of these two columns, then by row number. keep: int64 rows never to be chosen, -1 is ignored.
    With [begin, end) the whole table the choice is exact; with a slice, exact within the slice. Raises
    ValueError for another column, IndexError if the slice leaves the table.
    """
    check_chunks(chunks, 2, torch.int64)
    _check_slice(chunks, begin, end)
    if column not in (LAST_SEEN, COUNT) or k < 0:
        raise ValueError(f"expected column 0 or 1 and k >= 0, found column {column}, k {k}")
    if keep is not None:
        check_index("keep", keep)
    if not chunks:
        return torch.empty(0, dtype=torch.int64)
    ops = backend.ops_for(chunks[0]) or reference
    return ops.coldest(chunks, column, k, begin, end, keep)


def _check_slice(chunks: Sequence[Tensor], begin: int, end: int) -> None:
    total = len(chunks) * chunks[0].shape[0] if chunks else 0
    if not 0 <= begin <= end <= total:
        raise IndexError(f"slice: expected inside [0, {total}), found [{begin}, {end})")


@torch.library.register_fake("tessera::expired")
def _expired_fake(chunks: Sequence[Tensor], limit: int, begin: int, end: int) -> Tensor:
    return chunks[0].new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.register_fake("tessera::coldest")
def _coldest_fake(chunks: Sequence[Tensor], column: int, k: int, begin: int, end: int, keep: Tensor | None) -> Tensor:
    return chunks[0].new_empty(torch.library.get_ctx().new_dynamic_size())
