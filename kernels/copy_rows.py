"""Copy rows from one table to another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_chunks, check_index
from tessera.kernels.reference import copy_rows as reference


def copy_rows(source: Sequence[Tensor], rows: Tensor, target: Sequence[Tensor], places: Tensor) -> None:
    """Overwrite rows `places` of target with rows `rows` of source, whole.

    source, target: as `kernels/chunks.py` says, of one dtype and width on one device; rows, places: int64 [n], places
    distinct, none -1. Raises ValueError for wrong dtypes or shapes, IndexError for a row or place out of range.
    """
    check_index("rows", rows)
    check_index("places", places)
    if rows.numel() != places.numel():
        raise ValueError(f"places: expected {rows.numel()}, found {places.numel()}")
    if source and target and (source[0].dtype, source[0].shape[1:]) != (target[0].dtype, target[0].shape[1:]):
        found = f"{target[0].dtype} {list(target[0].shape)}"
        raise ValueError(f"target: expected {source[0].dtype} [rows, {source[0].shape[1]}], found {found}")
    for chunks in (source, target):
        check_chunks(chunks, 1)
    ops = backend.ops_for(rows) or reference
    ops.copy_rows(source, rows, target, places)
