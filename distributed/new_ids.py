"""Find rows of a batch with ids that the tables have no row for, by asking the owners of the ids."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.embedding.set_table import OwnedTable
from tessera.kernels.message import owner_of
from tessera.kernels.mix import mix64
from tessera.kernels.unique import unique_inverse


@torch.no_grad()
def rows_with_new_ids(tables: DynamicTables, ids: KeyedJaggedTensor) -> Tensor:
    """Return bool [B]: True if any id of the row has no row of its own in its table, on whatever rank. Changes nothing.

    All ranks call it together. ids: raw int64 ids, stride B.
    """
    values, lengths, bounds = ids.values(), ids.lengths(), ids.offset_per_key()
    place = {name: i for i, name in enumerate(ids.keys())}
    row_of_value = (
        torch.arange(lengths.numel(), device=values.device).remainder(ids.stride()).repeat_interleave(lengths)
    )
    asked, samples = [], []
    for table in tables.tables:
        spans = [slice(bounds[place[name]], bounds[place[name] + 1]) for name in table.features]
        asked.append(torch.cat([values[span] for span in spans]))
        samples.append(torch.cat([row_of_value[span] for span in spans]))
    found = torch.zeros(ids.stride(), dtype=torch.int64, device=values.device)
    for new, rows in zip(_without_row(tables, asked), samples, strict=True):
        found.index_add_(0, rows, new.long())
    return found > 0


def _without_row(tables: DynamicTables, asked: list[Tensor]) -> list[Tensor]:
    """Return for each table bool [n], True where an id (int64 [n]) has no row, by one exchange for all tables there and
    one back."""
    owned, world = list(tables.owned().values()), dist.get_world_size()
    if world == 1:
        return [_unknown(table, ids) for table, ids in zip(owned, asked, strict=True)]
    distinct, inverses, tables_of = [], [], []
    for number, ids in enumerate(asked):
        unique, inverse, _ = unique_inverse(ids)
        distinct.append(unique)
        inverses.append(inverse)
        tables_of.append(torch.full_like(unique, number))
    ids, table = torch.cat(distinct), torch.cat(tables_of)
    to = owner_of(mix64(ids), world)
    order = to.argsort(stable=True)  # by owner, and for each owner by table
    sent = torch.zeros(world * len(asked), dtype=torch.int64, device=ids.device)
    sent.index_add_(0, to * len(asked) + table, torch.ones_like(to))
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent)
    here, there = sent.view(world, -1).sum(1).tolist(), got.view(world, -1).sum(1).tolist()
    wanted = ids.new_empty(sum(there))
    dist.all_to_all_single(wanted, ids[order], there, here)
    pieces = wanted.split(got.tolist())
    answers = [_unknown(owned[i % len(asked)], piece) for i, piece in enumerate(pieces)]
    heard = torch.empty(ids.numel(), dtype=torch.uint8, device=ids.device)
    dist.all_to_all_single(heard, torch.cat(answers).to(torch.uint8), here, there)
    new = torch.empty_like(heard, dtype=torch.bool)
    new[order] = heard.bool()
    return [part[inverse] for part, inverse in zip(new.split([d.numel() for d in distinct]), inverses, strict=True)]


def _unknown(table: OwnedTable, ids: Tensor) -> Tensor:
    """Return bool [n], True where an id has no row. Tables with a cache are on the host, whatever device asks."""
    return (table.lookup(ids.to(table.device), 0, training=False) < 0).to(ids.device)
