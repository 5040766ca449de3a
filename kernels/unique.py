"""Find the distinct ids of a batch, in the order in which they first appear."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_index
from tessera.kernels.mix import mix64, unmix64
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


def unique_tables(
    ids: Tensor, bounds: Tensor, *, padded: bool = False, mixed: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge duplicates within each of many tables; equal ids of two tables are two.

    ids: int64 [n]; those of table t are at bounds[t] to bounds[t + 1] - 1, bounds int64 [tables + 1]. Returns (unique
    int64 [u], tables in order, each in order of first occurrence; inverse int64 [n] with unique[inverse] == ids;
    counts int64 [u]; bounds of `unique`, int64 [tables + 1]). O(n). Raises ValueError for wrong arguments.

    padded: on a GPU the host does not wait to learn u: unique and counts are int64 [n], zeros from bounds[-1] on.
    Elsewhere nothing is padded. mixed: `unique` are returned as `mix64` gives them.
    """
    check_index("ids", ids)
    check_index("bounds", bounds)
    if bounds.numel() < 2:
        raise ValueError(f"bounds: expected 2 or more, found {bounds.numel()}")
    waiting = backend.triton_for(ids) if padded else None
    if waiting is not None:
        found: tuple[Tensor, Tensor, Tensor, Tensor] = waiting.unique_padded(ids, bounds, mixed=mixed)
        return found
    ops = backend.ops_for(ids) or reference
    unique, inverse, counts, ends = ops.unique_tables(ids, bounds)
    return mix64(unique) if mixed else unique, inverse, counts, ends


class MergedLookUps(NamedTuple):
    """ids: int64 [u], as `unique_tables(..., padded=True)` gives them; inverse: int64 [n], the place among them of each
    look-up, in the order in which these came; times: int64 [u], how many look-ups are of each; bounds: int64
    [tables + 1]; counts: int64 [u], sums of those of the look-ups, not defined where they have none."""

    ids: Tensor
    inverse: Tensor
    times: Tensor
    bounds: Tensor
    counts: Tensor


def merge_look_ups(
    ids: Tensor, bounds: Tensor, counts: Tensor | None, order: Tensor | None, *, mixed: bool
) -> MergedLookUps:
    """Merge the look-ups of equal ids of a table. ids, bounds: as for `unique_tables`; counts: int64 or int32 [n], or
    None; order: int64 [n], where each stood when it came, None: there; mixed: ids are `mix64` of those that are
    returned. O(n). Raises ValueError for wrong arguments."""
    check_index("ids", ids)
    check_index("bounds", bounds)
    ops = backend.triton_for(ids)
    if ops is not None:
        return MergedLookUps(*ops.merge_look_ups(ids, bounds, counts, order, mixed=mixed))
    unique, flat, times, ends = unique_tables(unmix64(ids) if mixed else ids, bounds)
    sums = times if counts is None else torch.zeros_like(unique).index_add_(0, flat, counts.long())
    inverse = flat if order is None else torch.empty_like(flat).index_copy_(0, order, flat)
    return MergedLookUps(unique, inverse, times, ends, sums)


def positions_of(inverse: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of a batch by what they belong to.

    inverse: int64 [n], 0 <= inverse < u; counts: int64 [u], how often each occurs in it. Returns (order int64 [n],
    begins int64 [u + 1]): inverse is k at order[begins[k]:begins[k + 1]], which ascend. Raises ValueError for wrong
    arguments, IndexError for an inverse out of range.
    """
    check_index("inverse", inverse)
    check_index("counts", counts)
    ops = backend.ops_for(inverse) or reference
    return ops.positions_of(inverse, counts)


@torch.library.register_fake("tessera::unique_tables")
def _unique_tables_fake(ids: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(count), ids.new_empty(ids.shape), ids.new_empty(count), torch.empty_like(bounds)


@torch.library.register_fake("tessera::positions_of")
def _positions_of_fake(inverse: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return inverse.new_empty(inverse.shape), counts.new_empty(counts.shape[0] + 1)


@torch.library.register_fake("tessera::unique_inverse")
def _unique_inverse_fake(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(count), ids.new_empty(ids.shape), ids.new_empty(count)
