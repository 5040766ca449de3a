"""Initialise new rows: values that depend on (seed, table, id) alone, and the state's start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_chunks, check_index
from tessera.kernels.reference import initialise as reference

DISTRIBUTIONS = ("uniform", "normal")


class InitialValues(NamedTuple):
    """Values start as offset + scale * x, x drawn from `distribution`; scale = 0 makes them the constant `offset`. All
    of the state starts as `state`."""

    distribution: str
    offset: float
    scale: float
    state: float = 0.0


def init_rows(
    chunks: Sequence[Tensor], rows: Tensor, ids: Tensor, dim: int, initial: InitialValues, *, stream: int
) -> None:
    """Write whole rows in place: columns [0, dim) are values, the rest is state.

    x is `uniform` (in [0, 1)) or `normal` of `kernels/random.py` for (seed, table, id, column) at step 0, of which
    `stream` is the stream. chunks: float32, width dim or more; rows: int64 [n], distinct, -1 is skipped; ids: int64
    [n]. Raises ValueError for wrong dtypes, shapes or names, IndexError for a row out of range.
    """
    check_index("rows", rows)
    check_index("ids", ids)
    if ids.numel() != rows.numel() or dim < 1:
        raise ValueError(f"ids: expected {rows.numel()} as there are rows and dim >= 1, found {ids.numel()}, dim {dim}")
    distribution, *numbers = initial
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, found {distribution!r}")
    check_chunks(chunks, dim, torch.float32)
    ops = backend.ops_for(rows) or reference
    ops.init_rows(chunks, rows, ids, dim, distribution, numbers, stream)
