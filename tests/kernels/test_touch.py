import pytest
import torch

from tessera.kernels.backend import available_backends
from tessera.kernels.touch import COUNT, LAST_SEEN, coldest, expired, touch
from tests.kernels.property_tests import HealthCheck, given, settings, st
from tests.kernels.tables import some_rows

needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
meta = st.lists(st.tuples(st.integers(-5, 30), st.integers(0, 3)), min_size=1, max_size=40)


def chunks_of(pairs, chunk_rows=8):
    """Rows (last seen, count, something of the caller's), filled up with rows not in use."""
    dense = torch.zeros((-(-len(pairs) // chunk_rows) * chunk_rows, 3), dtype=torch.int64)
    dense[: len(pairs), :2] = torch.tensor(pairs)
    dense[:, 2] = 77
    return [chunk.clone() for chunk in dense.split(chunk_rows)]


@quick
@given(pairs=meta, data=st.data())
def test_touch_against_a_loop(backend, pairs, data):
    chunks = chunks_of(pairs)
    total = 8 * len(chunks)
    rows = data.draw(st.lists(st.integers(0, total - 1), unique=True)) + [-1]
    now = data.draw(st.one_of(st.integers(-9, 40), st.lists(st.integers(-9, 40), min_size=len(rows))))
    counts = data.draw(st.one_of(st.none(), st.just([k % 4 + 1 for k in range(len(rows))])))
    expected = torch.cat(chunks)
    for k, row in enumerate(rows[:-1]):
        time = now if isinstance(now, int) else now[k]
        seen, count, _ = expected[row].tolist()
        expected[row, 0] = time if count == 0 else max(seen, time)
        expected[row, 1] = count + (1 if counts is None else counts[k])
    times = now if isinstance(now, int) else torch.tensor(now[: len(rows)])
    touch(chunks, torch.tensor(rows), times, None if counts is None else torch.tensor(counts))
    assert torch.cat(chunks).equal(expected)


@quick
@given(pairs=meta, ttl=st.integers(1, 20), now=st.integers(0, 40), data=st.data())
def test_expired_against_a_loop(backend, pairs, ttl, now, data):
    chunks = chunks_of(pairs)
    begin = data.draw(st.integers(0, 8 * len(chunks)))
    end = data.draw(st.integers(begin, 8 * len(chunks)))
    expected = [r for r, (seen, count) in enumerate(pairs) if count and now - seen >= ttl and begin <= r < end]
    assert expired(chunks, now, ttl, begin, end).tolist() == expected


@quick
@given(pairs=meta, k=st.integers(0, 50), column=st.sampled_from([LAST_SEEN, COUNT]), data=st.data())
def test_coldest_against_sorting(backend, pairs, k, column, data):
    chunks = chunks_of(pairs)
    begin = data.draw(st.integers(0, 8 * len(chunks)))
    end = data.draw(st.integers(begin, 8 * len(chunks)))
    keep = data.draw(st.one_of(st.none(), st.lists(st.integers(-1, 8 * len(chunks) - 1))))
    ranks = [
        (pair[column], pair[1 - column], r)
        for r, pair in enumerate(pairs)
        if pair[1] and begin <= r < end and r not in (keep or [])
    ]
    kept = None if keep is None else torch.tensor(keep, dtype=torch.int64)
    assert coldest(chunks, column, k, begin, end, kept).tolist() == [r for _, _, r in sorted(ranks)[:k]]


def test_without_rows(backend):
    assert expired([], 5, 1, 0, 0).shape == coldest([], LAST_SEEN, 3, 0, 0).shape == (0,)
    touch([], torch.tensor([-1]), 3)


def test_refused_arguments(backend):
    chunks, rows = chunks_of([(1, 1)] * 8), torch.tensor([1, 2])
    with pytest.raises(IndexError, match="rows: expected below 8, found 8"):
        touch(chunks, torch.tensor([8]), 1)
    with pytest.raises(ValueError, match="now: expected one or 2 elements, found 3"):
        touch(chunks, rows, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="counts: expected 2 elements, found 1"):
        touch(chunks, rows, 1, torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="chunks: expected torch.int64"):
        touch([torch.zeros(8, 2)], rows, 1)
    with pytest.raises(IndexError, match=r"slice: expected inside \[0, 8\), found \[0, 9\)"):
        expired(chunks, 1, 1, 0, 9)
    with pytest.raises(ValueError, match="expected column 0 or 1"):
        coldest(chunks, 2, 1, 0, 8)


@needs_cpp
def test_threads_change_nothing(on_threads):
    rows = some_rows(20_000, 30_000, distinct=True)

    def work():
        chunks = [torch.zeros(4096, 2, dtype=torch.int64) for _ in range(8)]
        touch(chunks, rows, rows * 3, rows.clamp(min=1))
        return torch.cat(chunks)

    assert on_threads(1, work).equal(on_threads(2, work))


@needs_cpp
def test_schemas_and_fake_kernels():
    chunks, rows = chunks_of([(k, 1) for k in range(12)]), torch.tensor([1, -1])
    ops = torch.ops.tessera
    torch.library.opcheck(ops.touch.default, (chunks, rows, torch.tensor([4]), torch.tensor([1, 1])))
    torch.library.opcheck(ops.expired.default, (chunks, 5, 2, 14))
    torch.library.opcheck(ops.coldest.default, (chunks, 0, 3, 2, 14, rows))
