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

from tessera.distributed.event_times import latest, times_of_values
from tessera.kernels.mix import mix64
from tessera.kernels.unique import unique_tables

ALL_TABLES = "tables"  # the key; names of single tables begin otherwise (`module_name`)


@dataclass(frozen=True)
class DistinctIds:
    """mixed: int64 [u], those of table t at bounds[t] to bounds[t + 1] - 1; counts: int64 [u]; times: int64 [u], of the
    latest event of each, or None. index: int64 [values of the batch], the place of each. of_tables: how many are of
    each table."""

    mixed: Tensor
    bounds: Tensor
    counts: Tensor
    times: Tensor | None
    index: Tensor
    of_tables: list[int]


@torch.no_grad()
def distinct_ids(ids: KeyedJaggedTensor, times: Tensor | None, tables: Sequence[Sequence[int]]) -> DistinctIds:
    """Return the distinct ids of each table with their counts and times.

    times: int64 [B] of the rows, or None. tables: the places of the fields of each, of all fields of `ids`.
    """
    values, ends = ids.values(), ids.offset_per_key()
    spans = [slice(ends[field], ends[field + 1]) for fields in tables for field in fields]
    in_order = [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    sizes = [sum([ends[field + 1] - ends[field] for field in fields]) for fields in tables]
    bounds = torch.tensor([0, *accumulate(sizes)]).to(values.device, non_blocking=True)
    flat = values if in_order else torch.cat([values[span] for span in spans])
    unique, index, counts, found = unique_tables(flat, bounds)
    if not in_order:
        of_fields = index.split([span.stop - span.start for span in spans])
        index = torch.empty_like(values)
        for span, places in zip(spans, of_fields, strict=True):
            index[span] = places
    if times is not None:
        times = latest(times_of_values(ids, times), index, unique.numel())
    return DistinctIds(mix64(unique), found, counts, times, index, found.diff().tolist())
