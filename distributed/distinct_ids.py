"""Merge the ids of a batch, so that each is asked for once per table, and all tables in one message.

torchrec takes longer with each key, and on many ranks with keys times ranks. So it sees one key for all tables,
`ALL_TABLES`, and ids travel in a message of our own (`id_exchange.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from tessera.distributed.event_times import MIN_TIME
from tessera.kernels.host_numbers import on_device
from tessera.kernels.latest import latest_of_bags
from tessera.kernels.unique import unique_tables

ALL_TABLES = "tables"  # the key; names of single tables begin otherwise (`module_name`)


@dataclass(frozen=True)
class DistinctIds:
    """mixed: int64 [u], those of table t at bounds[t] to bounds[t + 1] - 1; counts: int64 [u]; times: int64 [u], of the
    latest event of each, or None. index: int64 [values of the batch], the place of each. On a GPU u is the number of
    values of the batch, so that the host need not wait for a smaller one: what is there from bounds[-1] on has count 0
    and is no id."""

    mixed: Tensor
    bounds: Tensor
    counts: Tensor
    times: Tensor | None
    index: Tensor


class FieldsOfTables:
    """The places of the fields of each table, of all fields of a batch."""

    def __init__(self, tables: Sequence[Sequence[int]]) -> None:
        self.flat = [field for fields in tables for field in fields]
        self.ends = [0, *accumulate(len(fields) for fields in tables)]
        self.in_order = self.flat == list(range(len(self.flat)))


@torch.no_grad()
def distinct_ids(ids: KeyedJaggedTensor, times: Tensor | None, tables: FieldsOfTables) -> DistinctIds:
    """Return the distinct ids of each table with their counts and times. times: int64 [B] of the rows, or None."""
    flat, ends = ids.values(), ids.offset_per_key()
    if tables.in_order:
        bounds = [ends[end] for end in tables.ends]
    else:
        sizes = [ends[field + 1] - ends[field] for field in tables.flat]
        begins = [0, *accumulate(sizes)]
        bounds = [begins[end] for end in tables.ends]
        flat = torch.cat([flat[ends[field] : ends[field + 1]] for field in tables.flat])
    unique, index, counts, found = unique_tables(flat, on_device(bounds, flat.device), padded=True, mixed=True)
    if not tables.in_order:
        of_fields = index.split(sizes)
        index = torch.empty_like(index)
        for field, places in zip(tables.flat, of_fields, strict=True):
            index[ends[field] : ends[field + 1]] = places
    if times is not None:
        times = latest_of_bags(times, ids.offsets().long(), index, unique.numel(), MIN_TIME)
    return DistinctIds(unique, found, counts, times, index)
