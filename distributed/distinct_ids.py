"""Merge the ids of a batch, so that each is asked for once per table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from tessera.distributed.ages import ages_of_values, least, packed
from tessera.kernels.mix import mix64
from tessera.kernels.unique import unique_inverse


@torch.no_grad()
def distinct_ids(
    ids: KeyedJaggedTensor, ages: Tensor | None, tables: Sequence[tuple[str, Sequence[int]]]
) -> tuple[KeyedJaggedTensor, Tensor]:
    """Return the distinct ids per table, mixed, with their counts and ages; and the place of each value of `ids` among
    them, int64 [values].

    ages: int64 [B] of the rows, or None. tables: name and places of the fields of each, of all fields of `ids`.
    """
    values, bounds = ids.values(), ids.offset_per_key()
    index = torch.empty_like(values)
    distinct, counts, lengths, first = [], [], [], 0
    for _, fields in tables:
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
        keys=[name for name, _ in tables],
        values=mix64(torch.cat(distinct)),
        weights=packed(torch.cat(counts), ages),
        lengths=torch.tensor(lengths, dtype=torch.int32).to(values.device, non_blocking=True),
        stride=1,
        length_per_key=lengths,
    )
    return asked, index
