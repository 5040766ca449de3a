"""Find the distinct ids of a batch, in the order in which they first appear."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.reference import unique as reference


def unique_inverse(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge duplicates.

    ids: int64 [n]. Returns (unique int64 [u] in order of first occurrence, inverse int64 [n] with
    unique[inverse] == ids, counts int64 [u]). O(n). Raises ValueError for wrong dtypes or shapes.
    """
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids: expected int64 [n], found {ids.dtype} {list(ids.shape)}")
    ops = backend.ops_for(ids) or reference
    return ops.unique_inverse(ids)


@torch.library.register_fake("tessera::unique_inverse")
def _unique_inverse_fake(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(count), ids.new_empty(ids.shape), ids.new_empty(count)
