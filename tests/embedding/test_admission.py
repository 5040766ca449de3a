"""The admission filters against slow versions of the same definitions, and what they promise."""

import math
import random

import pytest
import torch

from tessera.embedding import sliding
from tessera.embedding.admission import ExactCounter, ProbabilisticFilter, VocabularyFilter, admission_filter
from tessera.embedding.config import Admission, DynamicTableConfig, Group, key_of
from tessera.embedding.errors import ConfigError, TesseraError
from tessera.embedding.set_admission import SetAdmission
from tessera.embedding.sliding import SlidingFilterOfTable, SlidingFilters, SlidingHashFilter
from tessera.embedding.table import DynamicTable
from tessera.kernels.reference.mix import mix64_number
from tests.embedding.conftest import both_kinds


class SlowSliding:
    """One id at a time, buckets as lists of [signature, counter]."""

    def __init__(self, threshold, capacity, splits):
        self.threshold, self.splits = threshold, splits
        self.buckets = math.ceil(capacity * 1.2 / (splits - 3) / 16)
        self.parts = [[[] for _ in range(self.buckets)] for _ in range(splits)]
        self.used, self.head = [0] * splits, 0

    def place_of(self, i):
        h = mix64_number((i + 0x243F6A8885A308D3) % 2**64)
        return (h & (2**40 - 1)) % self.buckets, (h >> 40) % 4095 + 1

    def admit(self, ids, counts):
        if self.used[self.head] * 1.2 >= self.buckets * 16:
            self.head = (self.head + 1) % self.splits
            self.parts[(self.head + 2) % self.splits] = [[] for _ in range(self.buckets)]
            self.used[(self.head + 2) % self.splits] = 0
        merged = {}
        for i, count in zip(ids, counts, strict=True):
            merged[self.place_of(i)] = merged.get(self.place_of(i), 0) + count
        news, homeless = {}, []
        for place, count in merged.items():
            cell, age = self.find(*place)
            news[place] = min(15, (cell[1] if cell else 0) + count)
            if cell and age <= 2:
                cell[1] = news[place]
            else:
                homeless.append(place)
        passed = {place: new >= self.threshold for place, new in news.items()}
        for ahead in range(3):
            part = (self.head + ahead) % self.splits
            for place in list(homeless):
                if len(self.parts[part][place[0]]) < 16:
                    self.parts[part][place[0]].append([place[1], news[place]])
                    self.used[part] += 1
                    homeless.remove(place)
        for place in homeless:
            passed[place] = True
        return [passed[self.place_of(i)] for i in ids]

    def find(self, bucket, signature):
        for age in range(self.splits):
            for cell in self.parts[(self.head + 2 - age) % self.splits][bucket]:
                if cell[0] == signature:
                    return cell, age
        return None, None


@pytest.mark.parametrize("capacity", [40, 1, 400])
def test_sliding_filter_equals_the_slow_one(backend, capacity):
    draw = random.Random(capacity)
    fast, slow = SlidingHashFilter(4, capacity), SlowSliding(4, capacity, 7)
    pool = [draw.getrandbits(64) - 2**63 for _ in range(400)] + [0, -1, 2**63 - 1, -(2**63)]
    slid = 0
    for step in range(150):
        ids = draw.sample(pool, draw.randint(1, 60))
        counts = [draw.choice([1, 1, 1, 2, 30]) for _ in ids]
        if step % 50 == 49:  # a filter made from the state goes on in the same way
            state = {name: value.clone() for name, value in fast.export_state().items()}
            fast = SlidingHashFilter(4, capacity)
            fast.import_state(state)
        passed = fast.admit(torch.tensor(ids), torch.tensor(counts), step, step)
        assert passed.tolist() == slow.admit(ids, counts)
        slid += slow.head != 0
        state = fast.export_state()
        cells = state["cells"].view(7, -1, 16).tolist()
        for part in range(7):
            for bucket, slow_cells in enumerate(slow.parts[part]):
                expected = [s << 4 | n for s, n in slow_cells] + [0] * (16 - len(slow_cells))
                assert [cell % 2**16 for cell in cells[part][bucket]] == expected
        assert (state["used"].tolist(), int(state["head"])) == (slow.used, slow.head)
    assert slid > 0


def test_sliding_filter_counts_exactly_while_it_has_room():
    ids = torch.randperm(1000) * 977 + 5
    filter_ = SlidingHashFilter(3, capacity=100_000)
    passed = [filter_.admit(ids, torch.ones_like(ids), 0, step) for step in range(3)]
    assert [int(p.sum()) for p in passed] == [0, 0, 1000]


def test_sliding_filter_forgets_what_does_not_come_back_and_carries_over_what_does():
    capacity = 2000
    filter_ = SlidingHashFilter(3, capacity)
    kept, gone = torch.tensor([11]), torch.tensor([12])
    filter_.admit(torch.cat([kept, gone]), torch.ones(2, dtype=torch.int64), 0, 0)
    for step in range(1, 41):  # 20 times what it can hold
        ids = torch.arange(step * 1000, step * 1000 + 1000)
        filter_.admit(ids, torch.ones_like(ids), 0, step)
        if step == 2:
            assert not filter_.admit(kept, torch.tensor([1]), 0, 0)
        elif step == 4:
            assert filter_.admit(kept, torch.tensor([1]), 0, 0)
    assert filter_.nbytes == filter_.export_state()["cells"].numel() * 2 < 2 * 2 * capacity * 1.2 * 2
    assert not filter_.admit(gone, torch.tensor([2]), 0, 0)


def test_sliding_filter_remembers_its_capacity():
    capacity = 8000
    filter_ = SlidingHashFilter(2, capacity)
    for begin in range(0, capacity, 500):
        ids = torch.arange(begin, begin + 500)
        filter_.admit(ids, torch.ones_like(ids), 0, 0)
    ids = torch.arange(0, 500)
    assert bool(filter_.admit(ids, torch.ones_like(ids), 0, 0).all())


def test_sliding_filter_errs_by_the_stated_share():
    filter_ = SlidingHashFilter(2, 200_000)
    early = 0
    for begin in range(0, 100_000, 10_000):
        ids = torch.arange(begin, begin + 10_000)
        early += int(filter_.admit(ids, torch.ones_like(ids), 0, 0).sum())
    parts = 100_000 * 1.2 / (filter_.filters.buckets[0] * sliding.WAYS)
    assert early / 100_000 < 13 * parts / 4095


def test_exact_counter_forgets_admitted_and_old_ids(backend):
    counter = ExactCounter(3, ttl_seconds=10)
    ids, ones = torch.tensor([5, -1, 2**63 - 1]), torch.ones(3, dtype=torch.int64)
    assert not counter.admit(ids, ones, 100, 0).any() and len(counter) == 3
    assert counter.admit(ids, torch.tensor([2, 1, 5]), 105, 0).tolist() == [True, False, True] and len(counter) == 1
    counter.expire(114)
    assert len(counter) == 1
    counter.expire(115)
    assert len(counter) == 0
    assert not counter.admit(ids, ones * 2, torch.tensor([120, 121, 122]), 0).any()
    counter.expire(131)
    assert counter.export_state()["ids"].tolist() == [2**63 - 1]


def test_exact_counts_can_be_cut_by_id(backend):
    counter, ids = ExactCounter(5), torch.arange(-10, 10)
    counter.admit(ids, torch.arange(20) % 4 + 1, 7, 0)
    state = counter.export_state()
    parts = [ExactCounter(5), ExactCounter(5)]
    for part, other in enumerate(parts):
        mine = state["ids"] % 2 == part
        other.import_state({name: value[mine] for name, value in state.items()})
        passed = other.admit(ids[ids % 2 == part], torch.full((10,), 2), 8, 0)
        assert passed.tolist() == [(i + 10) % 4 + 1 + 2 >= 5 for i in range(-10, 10) if i % 2 == part]


def draws(threshold, ids, count, step=0, seed=1):
    filter_ = ProbabilisticFilter(threshold, seed, key=11)
    return filter_.admit(ids, torch.full_like(ids, count), 0, step)


def test_probabilistic_filter_admits_95_percent_after_threshold_occurrences(backend):
    n, threshold = 20_000, 8
    ids = torch.arange(n)
    sigma = math.sqrt(n * 0.95 * 0.05)
    at_once = int(draws(threshold, ids, threshold).sum())
    assert abs(at_once - 0.95 * n) < 4 * sigma
    one_by_one = torch.stack([draws(threshold, ids, 1, step) for step in range(threshold)])
    assert abs(int(one_by_one.any(dim=0).sum()) - 0.95 * n) < 4 * sigma
    once = 1 - 0.05 ** (1 / threshold)
    for passed in one_by_one:
        assert abs(int(passed.sum()) - once * n) < 4 * math.sqrt(n * once * (1 - once))


def test_probabilistic_filter_depends_on_seed_id_and_step_alone(backend):
    ids = torch.arange(1000)
    order = torch.randperm(1000)
    assert torch.equal(draws(4, ids[order], 1), draws(4, ids, 1)[order])
    assert not torch.equal(draws(4, ids, 1), draws(4, ids, 1, step=1))
    assert not torch.equal(draws(4, ids, 1), draws(4, ids, 1, seed=2))


@both_kinds
@pytest.mark.usefixtures("of_table")
@pytest.mark.parametrize("kind", ["exact", "sliding", "probabilistic"])
def test_table_rejects_counts_and_goes_on_from_its_state(backend, kind):
    config = DynamicTableConfig("t", ("f",), (Group("v", 2, 1.0),), admission=Admission(kind, 3, capacity=1000))
    table, ids = DynamicTable(config), torch.arange(500)
    for step in range(6):
        if step == 3:
            moved = DynamicTable(config)
            moved.import_state(table.export_state())
            for batch in table.export_rows():
                moved.import_rows(batch)
        if step >= 3:
            assert torch.equal(moved.lookup(ids, step), table.lookup(ids, step))
            continue
        rows = table.lookup(ids, step)
        rejected = rows < 0
        assert torch.equal(table.gather(rows)[rejected], torch.zeros(int(rejected.sum()), 2))
        if kind != "probabilistic":
            assert int((~rejected).sum()) == (500 if step == 2 else 0)
    stats = table.stats()
    assert stats["new"] == stats["admitted"] + stats["rejected"] and stats["admitted"] == stats["rows"] > 0
    assert moved.stats() | {"bytes": 0, "bytes_per_row": 0} == stats | {"bytes": 0, "bytes_per_row": 0}


def test_tables_of_a_set_admit_together_what_each_admits_alone(backend):
    """By chance, by counts and by a vocabulary, beside tables that admit all."""
    kinds = [Admission("probabilistic", 3), Admission(), Admission("exact", 2), Admission("probabilistic", 8)]
    kinds += [Admission("vocabulary", vocabulary="its folder")]
    groups = (Group("v", 2, 0.1),)
    configs = [DynamicTableConfig(f"t{i}", ("f",), groups, seed=5, admission=kind) for i, kind in enumerate(kinds)]
    generator, sizes = torch.Generator().manual_seed(2), [300, 50, 50, 200, 100]
    together = SetAdmission(configs, torch.device("cpu"))
    alone = [admission_filter(c.admission, c.seed, key_of(c.name), None, "cpu") for c in configs]
    for one in (together.filters[4], alone[4]):
        one.give(torch.arange(-5, 1000, 3) * 2**40 + 1)
    for step in range(3):
        ids, counts = torch.arange(700) * 2**40 + step, torch.randint(1, 9, (700,), generator=generator)
        tables = torch.arange(5).repeat_interleave(torch.tensor(sizes))
        found = together.admit(ids, tables, sizes, counts, 7, step)
        parts = [
            torch.ones(len(own), dtype=torch.bool) if one is None else one.admit(own, often, 7, step)
            for one, own, often in zip(alone, ids.split(sizes), counts.split(sizes), strict=True)
        ]
        assert found.equal(torch.cat(parts)) and 0 < found[:300].sum() < 300
        assert found[600:].equal((ids[600:] // 2**40 % 3 == 1) & torch.tensor(step == 1))


def test_a_vocabulary_admits_its_ids_from_their_first_batch_on_and_no_others(backend):
    one = VocabularyFilter("cpu")
    with pytest.raises(TesseraError, match="admission.kind is vocabulary, and the table was given none"):
        one.admit(torch.tensor([1]), torch.tensor([1]), 0, 0)
    ids = torch.tensor([9, -(2**63), 4, 2**63 - 1, 0])
    for vocabulary, expected in (([], []), ([4], [4]), ([-(2**63), 0, 9], [9, -(2**63), 0])):
        one.give(torch.tensor(vocabulary, dtype=torch.int64))
        assert ids[one.admit(ids, torch.ones_like(ids), 0, 0)].tolist() == expected
    with pytest.raises(
        ConfigError, match="admission.vocabulary is None; expected the folder that `tessera prepare stats"
    ):
        DynamicTableConfig("t", ("f",), (Group("v", 2, 0.1),), admission=Admission("vocabulary"))


def test_sliding_filters_of_a_set_are_cell_by_cell_what_each_is_alone(backend):
    """Of several sizes and thresholds, beside a table without one and one that some batches have nothing of."""
    rules = [(3, 60, 7), None, (2, 200, 5), (15, 1, 4), (4, 60, 7)]
    together, alone = SlidingFilters(rules), [rule and SlidingHashFilter(*rule) for rule in rules]
    parts = [rule and SlidingFilterOfTable(together, table) for table, rule in enumerate(rules)]
    draw, passed, slid = torch.Generator().manual_seed(4), 0, 0
    for step in range(60):
        sizes = [*torch.randint(1, 40, (4,), generator=draw).tolist(), 0 if step % 3 else 9]
        ids = torch.cat([torch.randperm(150, generator=draw)[:size] * 2**50 + step // 9 for size in sizes])
        counts = torch.randint(1, 4, ids.shape, generator=draw)
        found = together.admit(ids, torch.arange(5).repeat_interleave(torch.tensor(sizes)), sizes, counts)
        each = zip(alone, ids.split(sizes), counts.split(sizes), found.split(sizes), strict=True)
        for one, own, often, mine in each:
            assert bool(mine.all()) if one is None else mine.equal(one.admit(own, often, 0, step))
        passed += int((~found).sum())
        slid += sum(together.heads)
        if step == 30:  # one table goes on from what another run has saved
            parts[0].import_state(alone[0].export_state())
    assert passed > 100 and slid > 100
    for part, one in zip(parts, alone, strict=True):
        if one is not None:
            assert all(value.equal(part.export_state()[name]) for name, value in one.export_state().items())
