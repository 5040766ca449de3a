"""Ids, what goes with them and what ranks tell each other reach their owners in one message, whatever there is room
for; answers and gradients take one message each."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import KeyedJaggedTensor

from tessera.distributed.dynamic_tables import DynamicTables
from tessera.distributed.id_exchange import IdExchange, OutgoingIds
from tessera.distributed.message_room import RECENT, RecentSizes, message_bytes, room_for
from tessera.distributed.sharding import shard
from tessera.distributed.torchrec.answers import answer
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.kernels.message import owner_of
from tessera.kernels.message_layout import MessageLayout
from tessera.kernels.mix import mix64
from tests.ranks import on_ranks

KINDS = 40  # more than there are ids for a rank in small steps: their numbers travel, in others their counts
#: Ids of each rank in the steps of an exchange; the first has room for none, and 400 are more than there is room for.
STEPS = [(30, 20, 25), (31, 0, 19), (0, 0, 0), (400, 10, 0), (380, 390, 400), (12, 400, 395), (5, 4, 3)]


def asked(step: int, rank: int) -> OutgoingIds:
    """Ids of one rank and step: in step 5 one owner has them all."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    count = STEPS[step][rank]
    ids = mix64(torch.randint(-(2**62), 2**62, (10 * count,), generator=generator))
    ids = ids[owner_of(ids, 6) == 0 if step == 5 else ids == ids][:count]
    assert len(ids) == count
    kinds = torch.randint(0, KINDS, (count,), generator=generator).sort().values
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(kinds, minlength=KINDS).cumsum(0)])
    columns = (torch.arange(count) * 10 + rank, torch.rand(count, generator=generator))
    told = torch.tensor([rank + 0.25, -math.inf, step], dtype=torch.float64)
    return OutgoingIds(ids, bounds, columns, told)


def kinds_of(outgoing: OutgoingIds) -> torch.Tensor:
    return torch.arange(KINDS).repeat_interleave(outgoing.bounds.diff())


def expected(step: int, rank: int, ranks: int) -> list[tuple[int, int, int, float]]:
    """What a rank owns: by kind, then by the rank that asks, then as it asks."""
    rows = []
    for sender in range(ranks):
        one = asked(step, sender)
        mine = owner_of(one.ids, ranks) == rank
        columns = (kinds_of(one), one.ids, *one.columns)
        rows += zip(*(column[mine].tolist() for column in columns), strict=True)
    return sorted(rows, key=lambda row: row[0])


def exchanged(process) -> list[tuple[bool, int, int]]:
    """Check every step; return of each whether kinds had numbers, and its collectives forward and backward."""
    exchange, ranks, found = IdExchange(dist.group.WORLD), process.world_size, []
    for step in range(len(STEPS)):
        outgoing = asked(step, process.rank)
        with Counted() as counted:
            sent = exchange.send(outgoing)
            told, received = sent.told, sent.received()
            there = received.ids.double().unsqueeze(1).repeat(1, 3)  # an answer in which one sees whose it is
            back = torch.empty_like(there).index_copy_(0, received.order, there).float().requires_grad_()
            answered = answer(back, received.route, None)
            (answered * torch.arange(answered.numel()).view_as(answered)).sum().backward()
        assert told.tolist() == [[rank + 0.25, -math.inf, step] for rank in range(ranks)]
        kinds = torch.arange(KINDS).repeat_interleave(received.bounds.diff())
        rows = zip(*(one.tolist() for one in (kinds, received.ids, *received.columns)), strict=True)
        assert list(rows) == expected(step, process.rank, ranks)
        assert torch.equal(answered.detach(), outgoing.ids.double().float().unsqueeze(1).repeat(1, 3))
        places = received.columns[0] // 10  # of the ids where they were asked for
        grads = (places.unsqueeze(1) * 3 + torch.arange(3)) / ranks
        torch.testing.assert_close(back.grad[received.order], grads)
        assert sent.received() is received
        found.append((sent._layout.numbered, counted.calls["alltoall_base_"], sum(counted.calls.values())))
    return found


class Counted(TorchDispatchMode):
    """calls: of collectives, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("world", [2, 3])
def test_all_ids_arrive_in_order_with_room_and_without(world):
    results = on_ranks(world, exchanged)
    assert all(one == results[0] for one in results)
    numbered, calls, of_all_kinds = zip(*results[0], strict=True)
    assert calls == of_all_kinds
    assert calls[0] == calls[3] == 4  # no sizes were known, or they were too small
    assert calls[1] == calls[2] == calls[6] == 3
    assert not numbered[0] and numbered[1] and not numbered[6]  # numbers only where there is little room


def steps_of_tables(process) -> list[dict[str, int]]:
    """Collectives of training steps and of a look-up without one, and what ranks told."""
    names = [f"t{i}" for i in range(5)]
    groups = (Group("v", 4, 0.5), Group("w", 1, 0.5))
    tables = DynamicTables([DynamicTableConfig(n, (n,), groups, chunk_rows=64) for n in names], names, 100)
    model = torch.nn.ModuleDict({"tables": tables})
    model.forward = lambda ids: sum(one.sum() for one in tables(ids).values())
    shard(model, tables, process, 40)
    found = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + process.rank)
        rows = 0 if step == 2 and process.rank == 1 else 40
        ids = KeyedJaggedTensor(
            names,
            torch.randint(0, 500, (5 * rows,), generator=generator),
            lengths=torch.ones(5 * rows).int(),
            stride=rows,
        )
        told = torch.tensor([rows, process.rank], dtype=torch.float64)
        with Counted() as counted:
            begun = tables.begin(ids, None, told)
            assert begun.told[:, 1].tolist() == list(range(process.world_size))
            tables.begin_step(step)
            model.forward(ids).backward()
        found.append(dict(counted.calls))
    model.eval()
    with Counted() as counted, torch.no_grad():
        model.forward(ids)
    return [*found, dict(counted.calls)]


@pytest.mark.parametrize("world", [2, 3])
def test_a_step_has_three_collectives_for_its_tables(world):
    for counts in on_ranks(world, steps_of_tables):
        first, *others, looked_up = counts
        assert first == {"alltoall_base_": 4} and looked_up == {"alltoall_base_": 2}
        assert others == [{"alltoall_base_": 3}] * 3


def test_room_follows_what_was_sent():
    sizes = RecentSizes()
    assert sizes.room() == 0
    sizes.note(100.0, 120)
    assert sizes.room() == room_for(100.0) == 168 and room_for(0.0) == 8
    sizes.note(100.0, 300)
    assert sizes.room() == 300
    for _ in range(RECENT):
        sizes.note(400.0, 410)
    assert sizes.room() == room_for(400.0) == 528


def test_columns_lie_behind_the_header_one_after_the_other():
    many = MessageLayout(room=168, kinds=26, told=4, sizes=(8, 4))
    assert not many.numbered and many.header == 3 + 4 + 13
    assert many.begins == (20, 188, 356) and many.words == 356 + 84
    few = MessageLayout(room=8, kinds=200, told=0, sizes=(4,))
    assert few.numbered and few.columns == (8, 4, 2) and few.words == 3 + 8 + 4 + 2
    assert MessageLayout(8, 70_000, 0, ()).columns == (8, 4)
    assert message_bytes(100.0, 26, 4, [8, 4]) == 8 * many.words
