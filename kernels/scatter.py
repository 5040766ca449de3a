"""Write rows of a table as they are: import, reset, clearing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_chunks, check_index
from tessera.kernels.reference import scatter as reference


def scatter(chunks: Sequence[Tensor], rows: Tensor, values: Tensor, begin: int = 0) -> None:
    """Write values into columns [begin, begin + k) of rows, in place.

    chunks: as `kernels/chunks.py` says, of any dtype; rows: int64 [n], distinct, -1 is skipped; values:
    [n, k] of the chunks' dtype, or [1, k] for all rows alike. Raises ValueError for wrong dtypes or shapes,
    IndexError for a row out of range.
    """
    check_index("rows", rows)
    dtype = chunks[0].dtype if chunks else values.dtype
    if values.dim() != 2 or values.shape[0] not in (1, rows.numel()) or values.dtype != dtype or begin < 0:
        found = f"{values.dtype} {list(values.shape)}, begin {begin}"
        raise ValueError(f"values: expected {dtype} [{rows.numel()} or 1, k], begin >= 0, found {found}")
    check_chunks(chunks, begin + values.shape[1])
    ops = backend.ops_for(rows) or reference
    ops.scatter(chunks, rows, values, begin)


def scatter_columns(chunks: Sequence[Tensor], rows: Tensor, parts: Sequence[Tensor], begin: int = 0) -> None:
    """Write tensors side by side into columns [begin, begin + sum of k) of rows, in place.

    parts: one or more, each [n, k] of the chunks' dtype, or [1, k] for all rows alike; otherwise as `scatter`, which
    would need them in one tensor.
    """
    check_index("rows", rows)
    dtype = chunks[0].dtype if chunks else parts[0].dtype
    for part in parts:
        if part.dim() != 2 or part.shape[0] not in (1, rows.numel()) or part.dtype != dtype or begin < 0:
            found = f"{part.dtype} {list(part.shape)}, begin {begin}"
            raise ValueError(f"parts: expected {dtype} [{rows.numel()} or 1, k], begin >= 0, found {found}")
    check_chunks(chunks, begin + sum(part.shape[1] for part in parts))
    ops = backend.ops_for(rows) or reference
    ops.scatter_columns(chunks, rows, parts, begin)
