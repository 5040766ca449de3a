"""Read rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_chunks, check_index
from tessera.kernels.reference import gather as reference


def gather(
    chunks: Sequence[Tensor],
    rows: Tensor,
    dim: int,
    inverse: Tensor | None = None,
    default: Tensor | None = None,
    begin: int = 0,
) -> Tensor:
    """Return columns [begin, begin + dim) of rows, in the dtype of the chunks.

    chunks: as `kernels/chunks.py` says, of any dtype (float32 if there is none yet); rows: int64 [u], -1
    reads `default` ([dim], the chunks' dtype) or zeros; inverse: int64 [n], 0 <= inverse < u. Returns
    [u, dim], or with `inverse` [n, dim], row i being that of rows[inverse[i]]. Raises ValueError for wrong
    dtypes or shapes, IndexError for a row or inverse out of range.
    """
    _check(chunks, rows, dim, default, begin)
    if inverse is not None:
        check_index("inverse", inverse)
    ops = backend.ops_for(rows) or reference
    return ops.gather(chunks, rows, dim, inverse, default, begin)


def _check(
    chunks: Sequence[Tensor],
    rows: Tensor,
    dim: int,
    default: Tensor | None,
    begin: int,
    dtype: torch.dtype | None = None,
) -> None:
    check_index("rows", rows)
    if dim < 1 or begin < 0:
        raise ValueError(f"expected dim >= 1 and begin >= 0, found dim {dim}, begin {begin}")
    check_chunks(chunks, begin + dim, dtype)
    of_rows = chunks[0].dtype if chunks else torch.float32
    if default is not None and (default.dtype != of_rows or default.shape != (dim,)):
        raise ValueError(f"default: expected {of_rows} [{dim}], found {default.dtype} {list(default.shape)}")


@torch.library.register_fake("tessera::gather")
def _gather_fake(
    chunks: Sequence[Tensor],
    rows: Tensor,
    dim: int,
    inverse: Tensor | None,
    default: Tensor | None,
    begin: int,
) -> Tensor:
    dtype = chunks[0].dtype if chunks else torch.float32
    count = rows.shape[0] if inverse is None else inverse.shape[0]
    return rows.new_empty((count, dim), dtype=dtype)
