"""Initialise new rows: values that depend on (seed, table, id) alone, and the state's start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_chunks, check_index
from tessera.kernels.reference import initialise as reference
from tessera.kernels.reference.random import stream

DISTRIBUTIONS = ("uniform", "normal")


def init_rows(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    dim: int,
    *,
    distribution: str,
    offset: float,
    scale: float,
    seed: int,
    table: int,
    state: float = 0.0,
) -> None:
    """Write whole rows in place: columns [0, dim) get offset + scale * x, the rest `state`.

    x is `uniform` (in [0, 1)) or `normal` of `kernels/random.py` for (seed, table, id, column) at step 0.
    scale = 0 writes the constant `offset`. chunks: float32, width dim or more; rows: int64 [n], distinct,
    -1 is skipped; ids: int64 [n]. Raises ValueError for wrong dtypes, shapes or names, IndexError for a
    row out of range.
    """
    check_index("rows", rows)
    check_index("ids", ids)
    if ids.numel() != rows.numel() or dim < 1:
        raise ValueError(f"ids: expected {rows.numel()} as there are rows and dim >= 1, found {ids.numel()}, dim {dim}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, found {distribution!r}")
    check_chunks(chunks, dim, torch.float32)
    arguments = (
        chunks,
        rows,
        ids,
        dim,
        distribution == "normal",
        offset,
        scale,
        stream(seed, table, 0),
        state,
    )
    if ops := backend.ops_for(rows):
        ops.init_rows(*arguments)
    else:
        reference.init_rows(*arguments)


@torch.library.register_fake("tessera::init_rows")
def _init_rows_fake(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    dim: int,
    bell: bool,
    offset: float,
    scale: float,
    stream: int,
    state: float,
) -> None:
    return None
