"""Merge the ids of a batch, so that each is asked for once per table, and all tables in one message.

torchrec takes longer with each key, and on many ranks with keys times ranks. So it sees one key for all tables:
`ALL_TABLES`, whose "rows of a batch" are the tables; lengths tell the owner of which table an id is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from tessera.distributed.ages import ages_of_values, least, packed
from tessera.kernels.mix import mix64
from tessera.kernels.unique import unique_inverse

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
    values, bounds = ids.values(), ids.offset_per_key()
    index = torch.empty_like(values)
    distinct, counts, lengths, first = [], [], [], 0
    for fields in tables:
        spans = [slice(bounds[field], bounds[field + 1]) for field in fields]
        one = values[spans[0]] if len(spans) == 1 else torch.cat([values[span] for span in spans])
        unique, inverse, count = unique_inverse(one)
        inverse += first
        begin = 0
        for span in spans:
            width = span.stop - span.start
            index[span] = inverse[begin : begin + width]
            begin += width
        distinct.append(unique)
        counts.append(count)
        lengths.append(unique.numel())
        first += unique.numel()
    if ages is not None:
        ages = least(ages_of_values(ids, ages), index, first)
    asked = KeyedJaggedTensor(
        keys=[ALL_TABLES],
        values=mix64(torch.cat(distinct)),
        weights=packed(torch.cat(counts), ages),
        lengths=torch.tensor(lengths, dtype=torch.int32).to(values.device, non_blocking=True),
        stride=len(lengths),
        length_per_key=[first],
    )
    return DistinctIds(asked, index, lengths)
