import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.id_map import IdMap
from tessera.kernels.reference.id_map import SLOTS, TABLE_SHIFT, TABLES, hash_of, id_of
from tests.kernels.property_tests import HealthCheck, given, settings, st

EXTREMES = [0, 1, -1, 2**63 - 1, -(2**63)]
# Ids whose search begins in the same line of the same segment: the last one, so that it goes round.
MEETING = id_of((torch.arange(12) << 20) + SLOTS - 1).tolist()


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def random_ids(n, seed=0):
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(seed))


def content(id_map, batch=5_000):
    found = {}
    for ids, rows in id_map.items(batch):
        assert ids.numel() == rows.numel() <= batch
        found.update(zip(ids.tolist(), rows.tolist(), strict=True))
    return found


def new_map():
    """An empty map where new tensors are."""
    return IdMap(torch.zeros(0).device)


def filled(ids):
    id_map = new_map()
    id_map.insert(ids, torch.arange(ids.numel()))
    return id_map


def test_hash_is_a_bijection():
    ids = torch.cat([tensor(EXTREMES), random_ids(1_000)])
    assert id_of(hash_of(ids)).equal(ids)


FAST = [name for name in available_backends() if name != "triton"]  # the interpreter is slow
starts = st.sampled_from([0, 10, 3_200, 10_000])


def steps_on(backends, most):
    """Lists of (action, ids, backend)."""
    ids = st.one_of(st.sampled_from(EXTREMES + MEETING), st.integers(0, 9_999), st.integers(-(2**63), 2**63 - 1))
    step = st.tuples(
        st.sampled_from(["find", "insert", "erase"]), st.lists(ids, max_size=30), st.sampled_from(backends)
    )
    return st.lists(step, max_size=most)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps_on(FAST, 15), start=starts)
def test_life_of_a_map_against_a_dict(steps, start):
    """Any backend may carry out any step on the same map."""
    live(steps, start)


@pytest.mark.skipif("triton" not in available_backends(), reason="Triton's interpreter is not available")
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps_on(["triton", *FAST], 8), start=starts)
def test_life_of_a_map_with_triton(steps, start):
    live(steps, start)


def live(steps, start):
    id_map, expected = filled(torch.arange(start)), {id_: id_ for id_ in range(start)}
    next_row = start
    for action, ids, backend in steps:
        with use_backend(backend):
            if action == "find":
                assert id_map.find(tensor(ids)).tolist() == [expected.get(id_, -1) for id_ in ids]
                continue
            ids = list(dict.fromkeys(ids))
            if action == "erase":
                assert id_map.erase(tensor(ids)).tolist() == [expected.pop(id_, -1) for id_ in ids]
            else:
                unknown = [k for k, id_ in enumerate(ids) if id_ not in expected]
                new_rows = torch.arange(next_row, next_row + len(unknown) + 2) * 3
                rows, new = id_map.find_or_insert(tensor(ids), new_rows)
                expected.update((ids[k], row) for k, row in zip(unknown, new_rows.tolist(), strict=False))
                next_row += len(unknown)
                assert rows.tolist() == [expected[id_] for id_ in ids]
                assert new.tolist() == unknown
        assert len(id_map) == len(expected)
    assert content(id_map) == expected


def test_growth_by_many_splits(backend):
    id_map, ids = new_map(), random_ids(60_000)
    for begin in range(0, ids.numel(), 20_000):
        rows, new = id_map.find_or_insert(ids[begin : begin + 20_000], torch.arange(begin, begin + 20_000))
        assert rows.equal(torch.arange(begin, begin + 20_000)) and new.numel() == 20_000
        assert id_map.find(ids).equal(torch.where(torch.arange(60_000) < begin + 20_000, torch.arange(60_000), -1))
    assert len(id_map) == 60_000 and len(content(id_map)) == 60_000
    assert 16 * 60_000 < id_map.nbytes < 64 * 60_000
    assert id_map.find(random_ids(1_000, seed=1)).eq(-1).all()


@pytest.mark.parametrize("count", [0, 2_000, 9_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_reserved_segments_are_those_that_insertion_makes(backend, count):
    ids, rows, reserved = random_ids(count), torch.arange(count), new_map()
    reserved.reserve(count)
    for begin in range(0, count, 20_000):
        reserved.insert(ids[begin : begin + 20_000], rows[begin : begin + 20_000])
    assert len(reserved) == count and reserved.find(ids).equal(rows)
    assert reserved.find(random_ids(1_000, seed=1)).eq(-1).all()
    assert reserved.nbytes == filled(ids).nbytes
    reserved.erase(ids[::2])
    assert reserved.find(ids).equal(torch.where(rows % 2 == 1, rows, -1))


def test_reserved_segments_in_several_chunks():
    ids, reserved = random_ids(1_300_000), new_map()
    reserved.reserve(ids.numel())
    assert reserved.nbytes > 256 * SLOTS * 16
    reserved.insert(ids, torch.arange(ids.numel()))
    assert reserved.find(ids).equal(torch.arange(ids.numel())) and reserved.nbytes == filled(ids).nbytes


def test_erase_and_regrow(backend):
    ids = random_ids(20_000)
    id_map = filled(ids)
    size = id_map.nbytes
    for turn in range(4):
        gone = ids[turn::4]
        assert id_map.erase(gone).tolist() == list(range(turn, 20_000, 4))
        assert id_map.find(gone).eq(-1).all() and len(id_map) == 15_000
        assert id_map.erase(gone[:100]).eq(-1).all()
        others = torch.ones(20_000, dtype=torch.bool)
        others[turn::4] = False
        assert id_map.find(ids[others]).equal(torch.arange(20_000)[others])
        id_map.insert(gone, torch.arange(turn, 20_000, 4))
    assert id_map.nbytes == size
    id_map.erase(ids)
    assert len(id_map) == 0 and content(id_map) == {}
    id_map.clear()
    assert id_map.nbytes < size and id_map.find(ids[:5]).eq(-1).all()


@pytest.mark.parametrize("first", available_backends())
@pytest.mark.parametrize("second", available_backends())
def test_long_runs_in_one_line(first, second):
    """Segments filled from one line on, around their end, then thinned out."""
    generator = torch.Generator().manual_seed(0)
    lines = torch.randint(0, 3, (200,), generator=generator) * 4 + SLOTS - 8 & SLOTS - 1
    ids = id_of((torch.arange(200) << 20) + lines)
    with use_backend(first):
        id_map = filled(ids)
    with use_backend(second):
        gone = torch.randperm(200, generator=generator)[:150]
        id_map.erase(ids[gone])
    kept = torch.arange(200)
    kept[gone] = -1
    with use_backend(first):
        assert id_map.find(ids).equal(kept)


def test_large_row_numbers(backend):
    id_map = new_map()
    largest = 2**TABLE_SHIFT - 1
    id_map.insert(tensor([5, 6]), tensor([2**31 + 1, largest]), tensor([0, TABLES - 1]))
    assert id_map.find(tensor([6, 5, 6]), tensor([TABLES - 1, 0, 0])).tolist() == [largest, 2**31 + 1, -1]
    with pytest.raises(ValueError, match="rows: expected 0"):
        id_map.insert(tensor([7]), tensor([largest + 1]))


def test_an_id_of_many_tables_is_as_many_ids(backend):
    """One that meets others of its line, too: hashes are equal where mix64 of the tables makes up for the ids."""
    tables = torch.arange(40)
    ids = torch.cat([torch.full((20,), 7), id_of(hash_of(tensor([7])), tables[20:])])
    id_map, rows = new_map(), torch.arange(40)
    assert hash_of(ids[20:], tables[20:]).unique().numel() == 1
    id_map.insert(ids, rows, tables)
    assert len(id_map) == 40
    assert id_map.find(ids, tables).equal(rows)
    assert id_map.find(ids, tables + 40).eq(-1).all()
    with pytest.raises(ValueError, match="already known"):
        id_map.insert(ids[30:31], tensor([99]), tables[30:31])
    found = [torch.cat(parts) for parts in zip(*id_map.items(), strict=True)]
    assert dict(zip(found[1].tolist(), found[0].tolist(), strict=True)) == dict(enumerate(ids.tolist()))
    assert id_map.erase(ids[::2], tables[::2]).equal(rows[::2])
    assert id_map.find(ids, tables).equal(torch.where(rows % 2 == 1, rows, -1))


def test_tables_stay_apart_when_segments_split(backend):
    ids, tables, rows = torch.arange(5_000).repeat(3), torch.arange(3).repeat_interleave(5_000), torch.arange(15_000)
    id_map = new_map()
    id_map.insert(ids, rows, tables)
    assert id_map.find(ids, tables).equal(rows) and id_map.find(ids, tables + 3).eq(-1).all()


def test_refused_tables(backend):
    if backend.startswith("triton"):
        pytest.skip("a kernel does not look at what its tables are")
    for wrong in ([-1], [TABLES]):
        with pytest.raises(ValueError, match="tables: expected 0 to"):
            new_map().find(tensor([1]), tensor(wrong))
    with pytest.raises(ValueError, match="tables: expected 1, found 2"):
        new_map().find(tensor([1]), tensor([0, 1]))


def test_ids_made_to_collide_are_refused(backend):
    upper = id_of(torch.arange(6_000) << 12)  # the upper 39 bits are zero: no directory tells them apart
    with pytest.raises(RuntimeError, match="the ids were made to collide"):
        new_map().insert(upper, torch.arange(6_000))


def test_refused_arguments(backend):
    id_map = filled(tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="already known"):
        id_map.insert(tensor([9, 2]), tensor([3, 4]))
    with pytest.raises(ValueError, match="already known"):
        new_map().insert(tensor([7, 7]), tensor([3, 4]))
    with pytest.raises(ValueError, match=r"rows: expected 0 to 2\^40 - 1"):
        new_map().insert(tensor([7]), tensor([-1]))
    with pytest.raises(ValueError, match="rows: expected 2, found 1"):
        id_map.insert(tensor([7, 8]), tensor([3]))
    with pytest.raises(ValueError, match="new_rows: expected 2 or more, found 1"):
        id_map.find_or_insert(tensor([7, 1, 8]), tensor([3]))
    with pytest.raises(ValueError, match="ids: expected int64"):
        id_map.find(torch.zeros(2))


def test_empty_batches(backend):
    id_map, none = new_map(), tensor([])
    assert id_map.find(none).shape == id_map.erase(none).shape == (0,)
    rows, new = id_map.find_or_insert(none, none)
    assert rows.shape == new.shape == (0,) and content(id_map) == {}
    assert filled(tensor([4])).find(none).shape == (0,)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_backends_hand_out_the_same_rows():
    maps = {name: new_map() for name in available_backends()}
    for batch in range(5):
        ids = torch.unique(random_ids(20_000, seed=batch) % 40_000)
        new_rows = torch.arange(20_000) + 20_000 * batch
        found = []
        for name, id_map in maps.items():
            with use_backend(name):
                found.append([*id_map.find_or_insert(ids, new_rows), id_map.erase(ids[::7])])
        for other in found[1:]:
            assert all(a.equal(b) for a, b in zip(other, found[0], strict=True))
    assert all(content(id_map) == content(maps["reference"]) for id_map in maps.values())


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_threads_change_nothing(on_threads):
    ids = random_ids(100_000)
    id_map = filled(ids[::2])
    assert on_threads(1, lambda: id_map.find(ids)).equal(on_threads(2, lambda: id_map.find(ids)))


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_schemas_and_fake_kernels():
    id_map = filled(torch.arange(10))
    state = id_map._directory, id_map._chunks, id_map._segments, id_map._counters
    torch.library.opcheck(torch.ops.tessera.id_map_find.default, (*state[:2], tensor([3, 99]), None))
    torch.library.opcheck(torch.ops.tessera.id_map_insert.default, (*state, tensor([20, 21]), tensor([1, 2]), None))
    torch.library.opcheck(torch.ops.tessera.id_map_erase.default, (*state, tensor([3, 20]), None))
