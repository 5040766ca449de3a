"""Merge the ids of a batch, so that each is asked for once per table, and all tables in one message.

torchrec takes longer with each key, and on many ranks with keys times ranks. So it sees one key for all tables:
`ALL_TABLES`, whose "rows of a batch" are the tables; lengths tell the owner of which table an id is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from tessera.distributed.ages import ages_of_values, least, packed
from tessera.kernels.mix import mix64
from tessera.kernels.unique import unique_tables

ALL_TABLES = "tables"  # the key; names of single tables begin otherwise (`module_name`)


@dataclass(frozen=True)
class DistinctIds:
    """ids: one key, whose stride is the number of tables; values are mixed, weights hold counts and ages. index: int64
    [values of the batch], the place of each among `ids`. of_tables: how many are of each table."""

    ids: KeyedJaggedTensor
    index: Tensor
    of_tables: list[int]


@torch.no_grad()
def distinct_ids(ids: KeyedJaggedTensor, ages: Tensor | None, tables: Sequence[Sequence[int]]) -> DistinctIds:
    """Return the distinct ids of each table with their counts and ages.

    ages: int64 [B] of the rows, or None. tables: the places of the fields of each, of all fields of `ids`.
    """
    values, ends = ids.values(), ids.offset_per_key()
    spans = [slice(ends[field], ends[field + 1]) for fields in tables for field in fields]
    in_order = [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    sizes = [sum(ends[field + 1] - ends[field] for field in fields) for fields in tables]
    bounds = torch.tensor([0, *accumulate(sizes)]).to(values.device, non_blocking=True)
    flat = values if in_order else torch.cat([values[span] for span in spans])
    unique, index, counts, found = unique_tables(flat, bounds)
    if not in_order:
        of_fields = index.split([span.stop - span.start for span in spans])
        index = torch.empty_like(values)
        for span, places in zip(spans, of_fields, strict=True):
            index[span] = places
    if ages is not None:
        ages = least(ages_of_values(ids, ages), index, unique.numel())
    lengths = found.diff()
    asked = KeyedJaggedTensor(
        keys=[ALL_TABLES],
        values=mix64(unique),
        weights=packed(counts, ages),
        lengths=lengths.int(),
        stride=len(tables),
        length_per_key=[unique.numel()],
    )
    return DistinctIds(asked, index, lengths.tolist())
