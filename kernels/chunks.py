"""Store a table's rows in a list of equal chunks [chunk_rows, width], chunk_rows a power of two.

Row r is row r & (chunk_rows - 1) of chunk r >> log2(chunk_rows). A table grows by appending a chunk, so no
row ever moves. Row number -1 stands for "no row" in every op. Values and optimizer state lie side by side in
one row of float32: columns [0, dim) are the values, the state follows.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
from torch import Tensor

_PAGE, _LARGE_PAGE = 4 << 10, 2 << 20  # bytes; memory of a large page or more begins at a multiple of it
_MOST_THREADS = 4  # that touch pages


def allocate_chunk(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Return zeros for one chunk, in large pages if the system offers them.

    Rows of a large table are read at random: with pages of 4 KiB nearly every one costs a walk through the
    page tables. Only fresh memory can become large pages, so it does not come from torch's allocator. It is
    committed when it is first written: a chunk that is hardly used costs little, and zeros cost nothing.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -everything.data_ptr() % _LARGE_PAGE
    with contextlib.suppress(OSError):  # a system without large pages refuses the advice
        memory.madvise(mmap.MADV_HUGEPAGE, begin, size // _LARGE_PAGE * _LARGE_PAGE)
    return everything[begin : begin + size].view(dtype).view(tuple(shape))


def touch_pages(fresh: Sequence[Tensor]) -> None:
    """Commit the memory of chunks, or of their first rows, now, if it is known that all will be written.

    To get new pages takes longer than to write rows, on a virtual machine whose host has to find them much longer.
    Several threads are faster than the one that would write the rows. fresh: as `allocate_chunk` gave them.
    """

    def write_pages(part: Tensor) -> None:
        part.view(-1).view(torch.uint8)[::_PAGE].zero_()

    parts = [part for part in fresh if part.device.type == "cpu"]
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "touch pages") as threads:
        list(threads.map(write_pages, parts))


def first_rows(chunks: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Return the parts of chunks that hold rows [0, rows)."""
    begins = accumulate((len(chunk) for chunk in chunks), initial=0)
    return [chunk[: rows - begin] for chunk, begin in zip(chunks, begins, strict=False) if begin < rows]


def check_chunks(chunks: Sequence[Tensor], columns: int, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless the first chunk looks right and has `columns` or more (all are alike)."""
    if not chunks:
        return
    first = chunks[0]
    good = first.dim() == 2 and first.shape[0] > 0 and first.shape[0] & (first.shape[0] - 1) == 0
    if not good or first.shape[1] < columns or dtype not in (None, first.dtype):
        wanted = f"{dtype or 'a tensor'} [a power of two, {columns} or more]"
        raise ValueError(f"chunks: expected {wanted}, found {first.dtype} {list(first.shape)}")


def check_index(name: str, index: Tensor) -> None:
    """Raise ValueError unless `index` is int64 [n]."""
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"{name}: expected int64 [n], found {index.dtype} {list(index.shape)}")
