"""Ids merged inside a host before they leave it: the same training as by the flat exchange, and less between hosts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.types import CommOp

from tessera.distributed.event_times import packed, unpacked
from tessera.distributed.host_exchange import HostExchange
from tessera.distributed.hosts import check_places, described, host_groups
from tessera.distributed.id_exchange import IdExchange, OutgoingIds
from tessera.distributed.torchrec.answers import answer
from tessera.distributed.torchrec.codecs import codecs
from tessera.embedding.errors import ConfigError
from tessera.kernels.message import owner_of
from tessera.kernels.mix import mix64
from tessera.kernels.unique import unique_tables
from tests.distributed.dictionary import Case, Reference, joined, same, train
from tests.distributed.test_dynamic_tables import load
from tests.distributed.test_dynamic_tables import train as train_and_save
from tests.ranks import on_hosts_of, on_ranks

RANKS, EACH, KINDS, DIM = 4, 2, 3, 16
#: Ids of each rank before they are merged; the first step and the fifth have no room for all.
STEPS = [(300, 200, 250, 310), (310, 0, 190, 300), (0, 0, 0, 0), (280, 290, 270, 300), (2000, 10, 0, 1500)]
CASE = Case(oov="learned", weighted=True, averaged=("b",), threshold=2)


class ToOtherHosts(TorchDispatchMode):
    """Bytes that this rank sends to ranks of other hosts in all_to_all, and how many of these there are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "alltoall_base" in func._schema.name:
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(args[2]))
            sent, parts = args[1], list(args[4]) or [len(args[1]) // len(ranks)] * len(ranks)
            away = sum(n for n, rank in zip(parts, ranks, strict=True) if rank // EACH != dist.get_rank() // EACH)
            self.bytes += away * sent[:1].nbytes if len(sent) else 0
            self.calls += 1
        return func(*args, **(kwargs or {}))


def asked(step: int, rank: int) -> tuple[OutgoingIds, Tensor, Tensor]:
    """Skewed ids of one rank and step with their counts and times: those of a small number occur on most ranks."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    count = STEPS[step][rank]
    kinds = torch.randint(0, KINDS, (count,), generator=generator).sort().values
    ids = mix64(torch.rand(count, generator=generator).pow(-1.2).long())
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(kinds, minlength=KINDS).cumsum(0)])
    unique, _, counts, found = unique_tables(ids, bounds)
    times = torch.randint(0, 1000, (unique.numel(),), generator=generator)
    told = torch.tensor([rank, step, -0.5], dtype=torch.float64)
    return OutgoingIds(unique, found, (packed(counts, times),), told), counts, times


def of_kinds(bounds: Tensor) -> Tensor:
    return torch.arange(KINDS).repeat_interleave(bounds.diff())


def owned(step: int, rank: int) -> dict[tuple[int, int, int], tuple[int, int]]:
    """What a rank owns, in the order in which it comes: (kind, host, id) -> count and latest time."""
    found: dict[tuple[int, int, int], tuple[int, int]] = {}
    for sender in range(RANKS):
        outgoing, counts, times = asked(step, sender)
        mine = owner_of(outgoing.ids, RANKS) == rank
        columns = (of_kinds(outgoing.bounds), outgoing.ids, counts, times)
        for kind, id, count, time in zip(*(one[mine].tolist() for one in columns), strict=True):
            key = (kind, sender // EACH, id)
            before = found.get(key, (0, 0))
            found[key] = before[0] + count, max(before[1], time)
    return dict(sorted(found.items(), key=lambda item: item[0][:2]))


def one_step(exchange: IdExchange | HostExchange, step: int, rank: int, transport: str = "fp32") -> tuple[dict, dict]:
    """Return what this rank owns, as `owned` says it, and the gradient of each id that it owns, summed."""
    registry = codecs(transport)
    both = None if registry is None else registry[CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name]
    outgoing, *_ = asked(step, rank)
    sent = exchange.send(outgoing)
    assert sent.told.tolist() == [[sender, step, -0.5] for sender in range(RANKS)]
    received = sent.received()
    counts, times = unpacked(received.columns[0])
    assert times is not None and received.ranks is not None
    names = (of_kinds(received.bounds), received.ranks, received.ids)
    keys = list(zip(*(one.tolist() for one in names), strict=True))
    there = received.ids.float().unsqueeze(1).repeat(1, DIM)
    rows = torch.empty_like(there).index_copy_(0, received.order, there).requires_grad_()
    answered = answer(rows, received.route, both)
    expected = outgoing.ids.float().unsqueeze(1).repeat(1, DIM)
    if both is not None:
        expected = expected.to(both.forward.quantized_dtype).float()  # once, though they travel twice
    assert torch.equal(answered.detach(), expected)
    (answered * (1 + rank) * unpacked(outgoing.columns[0])[0].unsqueeze(1)).sum().backward()
    grads: dict[tuple[int, int], float] = {}
    for (kind, _, id), grad in zip(keys, rows.grad[received.order, 0].tolist(), strict=True):
        grads[kind, id] = grads.get((kind, id), 0.0) + grad
    return dict(zip(keys, zip(counts.tolist(), times.tolist(), strict=True), strict=True)), grads


def exchanged(process) -> list[tuple[int, int]]:
    """Check every step; return bytes to other hosts in the fourth, flat and by host."""
    groups = host_groups(dist.group.WORLD, 60)
    assert groups is not None and host_groups(dist.group.WORLD, 60) is groups
    flat, by_host, sent = IdExchange(dist.group.WORLD), HostExchange(groups), []
    for step in range(len(STEPS)):
        found = []
        for exchange in (flat, by_host):
            with ToOtherHosts() as counted:
                found.append(one_step(exchange, step, process.rank))
            sent.append((counted.bytes, counted.calls))
        (_, expected), (keys, grads) = found
        assert list(keys.items()) == list(owned(step, process.rank).items())
        assert grads == pytest.approx(expected, rel=1e-6)
        _, rounded = one_step(by_host, step, process.rank, "bf16")
        # Each gradient is rounded to 8 bits where it leaves the rank, and its sum where it leaves the host.
        assert rounded == pytest.approx(expected, rel=2 * 2**-8)
    return sent


def all_of_it(process, folder):
    for each in (1, RANKS):
        on_hosts_of(process, each)
        assert host_groups(dist.group.WORLD, 60) is None
    on_hosts_of(process, EACH)
    sent = exchanged(process)
    flat, by_host = (train(process, replace(CASE, options=(("by_host", it),))) for it in (False, True))
    return sent, flat, by_host, train_and_save(process, folder, by_host=True)[1]


@pytest.fixture(scope="module")
def on_two_hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, *zip(*on_ranks(RANKS, all_of_it, folder), strict=True)


def test_less_goes_between_hosts(on_two_hosts):
    _, sent, *_ = on_two_hosts
    flat, by_host = (sum(one[2 * 3 + which][0] for one in sent) for which in (0, 1))
    assert by_host < 0.8 * flat
    calls = [(one[::2], one[1::2]) for one in sent]
    for flat_steps, host_steps in calls:
        assert [number for _, number in flat_steps] == [4, 3, 3, 3, 4]  # with a second message of ids where it is 4
        assert [number for _, number in host_steps][1:4] == [6, 6, 6] and host_steps[4][1] > 6


def test_training_equals_the_flat_one_and_a_dictionary(on_two_hosts):
    _, _, flat, by_host, _ = on_two_hosts
    for one, other in zip(flat, by_host, strict=True):
        assert list(one["rows"]) == list(other["rows"])  # in one order, too
    same(joined(by_host), joined(flat), rel=1e-6, absolute=1e-7)
    same(joined(by_host), Reference(CASE).train())
    assert "merged among the 2 ranks of each of 2 hosts" in by_host[0]["plan"] and "merged" not in flat[0]["plan"]


def in_half_precision(process):
    on_hosts_of(process, EACH)
    half = replace(CASE, transport="fp16")
    return [train(process, replace(half, options=(("by_host", it),))) for it in (False, True)]


@pytest.mark.slow
def test_in_half_precision_training_equals_the_flat_one_to_the_rounding_of_gradients():
    flat, by_host = zip(*on_ranks(RANKS, in_half_precision), strict=True)
    for one, other in zip(flat, by_host, strict=True):
        assert list(one["rows"]) == list(other["rows"])
    same(joined(by_host), joined(flat), rel=2**-6, absolute=2**-7)


def test_its_states_are_loaded_by_any_ranks(on_two_hosts):
    folder, *_, saved = on_two_hosts
    loaded = on_ranks(2, load, folder)
    for name in ("a", "bc"):
        before = {i: row for tables in saved for i, row in tables[name].items()}
        assert {i: row for tables in loaded for i, row in tables[name].items()} == before


def test_on_one_host_or_with_one_rank_on_each_it_says_that_it_changes_nothing(on_two_hosts):
    assert "changes nothing on one host, or with one rank on each" in described(None)  # for which `all_of_it` asks


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ([(0, 2), (1, 2), (0, 1)], "hosts have 1 and 2 ranks; expected equally many"),
        ([(0, 2), (0, 2), (1, 2), (1, 2)], "rank 1 of 4 is number 0 of 2 on its host"),
        ([(0, 2), (1, 2), (0, 2)], "rank 0 of 3 is number 0 of 2 on its host"),
    ],
)
def test_hosts_of_other_kinds_are_refused(places, found):
    with pytest.raises(ConfigError, match=found):
        check_places(places)
    check_places([(0, 2), (1, 2), (0, 2), (1, 2)])
