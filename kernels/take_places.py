"""Give each row a place in order of arrival, once."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_index
from tessera.kernels.reference import take_places as reference


def take_places(places: Tensor, rows: Tensor, taken: int) -> Tensor:
    """Return rows whose entry in `places` is 0, in order: int64 [k]. Their entries become taken + 1, taken + 2 and so
    on.

    places: int32 [m], m >= 1; its last entry is that of row -1 and of rows from m - 1 on, and must not be 0; rows:
    int64 [n], distinct but for these. Raises ValueError for wrong dtypes or shapes.
    """
    check_index("rows", rows)
    if places.dtype != torch.int32 or places.dim() != 1 or not places.numel():
        raise ValueError(f"places: expected int32 [1 or more], found {places.dtype} {list(places.shape)}")
    ops = backend.ops_for(rows) or reference
    return ops.take_places(places, rows, taken)


@torch.library.register_fake("tessera::take_places")
def _take_places_fake(places: Tensor, rows: Tensor, taken: int) -> Tensor:
    return rows.new_empty(torch.library.get_ctx().new_dynamic_size())
