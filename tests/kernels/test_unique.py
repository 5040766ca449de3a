import pytest
import torch

from tessera.kernels.backend import available_backends
from tessera.kernels.unique import unique_inverse
from tests.kernels.property_tests import HealthCheck, given, settings, st

EXTREMES = [0, 1, -1, 2**63 - 1, -(2**63)]


def by_dict(ids):
    """The definition on Python integers."""
    place, inverse, counts = {}, [], []
    for id_ in ids:
        if id_ not in place:
            place[id_] = len(place)
            counts.append(0)
        inverse.append(place[id_])
        counts[place[id_]] += 1
    return list(place), inverse, counts


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.one_of(st.integers(-3, 3), st.sampled_from(EXTREMES), st.integers(-(2**63), 2**63 - 1))))
def test_against_a_dict(backend, ids):
    found = unique_inverse(torch.tensor(ids, dtype=torch.int64))
    assert [part.tolist() for part in found] == list(by_dict(ids))
    assert all(part.dtype == torch.int64 for part in found)


@pytest.mark.parametrize("distinct", [1, 300, 30_000])
def test_large_batches(backend, distinct):
    ids = torch.randint(0, distinct, (50_000,), generator=torch.Generator().manual_seed(0)) * -7919
    unique, inverse, counts = unique_inverse(ids)
    assert unique[inverse].equal(ids)
    assert counts.equal(torch.bincount(inverse, minlength=unique.numel()))
    assert unique.sort().values.equal(ids.unique())
    # order of first occurrence: every new index is one more than all before it
    assert inverse[0] == 0 and inverse.cummax(0).values.diff().amax() <= 1


def test_strided_ids(backend):
    ids = torch.arange(20) // 3
    both = torch.stack([ids, ids + 1], dim=1)
    assert all(a.equal(b) for a, b in zip(unique_inverse(both[:, 0]), unique_inverse(ids), strict=True))


def test_refused_arguments(backend):
    with pytest.raises(ValueError, match="ids: expected int64"):
        unique_inverse(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="ids: expected int64"):
        unique_inverse(torch.zeros((3, 1), dtype=torch.int64))


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_schema_and_fake_kernel():
    torch.library.opcheck(torch.ops.tessera.unique_inverse.default, (torch.tensor([3, 4, 3]),))
