"""How a table's rows are stored: a list of equal chunks [chunk_rows, width], chunk_rows a power of two.

Row r is row r & (chunk_rows - 1) of chunk r >> log2(chunk_rows). A table grows by appending a chunk, so no
row ever moves. Row number -1 stands for "no row" in every op. Values and optimizer state lie side by side in
one row of float32: columns [0, dim) are the values, the state follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
