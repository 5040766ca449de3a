import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.mix import mix64, unmix64
from tessera.kernels.reference.bits import signed
from tessera.kernels.reference.mix import mix64_number
from tests.kernels.property_tests import HealthCheck, given, settings, st

EXTREMES = [0, 1, -1, 2, 2**63 - 1, -(2**63), 1 << 30, (1 << 32) + 1]


def random_ids(*shape):
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(0))


def test_published_sequence_of_splitmix64(backend):
    """splitmix64 started at state 0 returns mix64(G), mix64(2 G), mix64(3 G) for its increment G."""
    states = torch.tensor([signed(i * 0x9E3779B97F4A7C15) for i in (1, 2, 3)])
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [x & (2**64 - 1) for x in mix64(states).tolist()] == expected


def test_inverse(backend):
    x = torch.cat([torch.tensor(EXTREMES), random_ids(200_000)])
    assert unmix64(mix64(x)).equal(x)
    assert mix64(unmix64(x)).equal(x)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=st.integers(-(2**63), 2**63 - 1))
def test_tensor_and_number_agree(backend, x):
    assert mix64(torch.tensor(x)).item() == signed(mix64_number(x))


def test_shapes_and_strides(backend):
    x = random_ids(40, 6)
    assert mix64(x[:, ::2]).equal(mix64(x)[:, ::2])
    assert mix64(x[:0]).shape == (0, 6)
    assert mix64(x.t()).equal(mix64(x).t())


@pytest.mark.parametrize("step", [1, 2, 1 << 20, -1])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_regular_ids_spread_evenly(backend, step, parts):
    counts = torch.bincount(mix64(torch.arange(60_000) * step).remainder(parts), minlength=parts).double()
    expected = 60_000 / parts
    # chi-square with parts - 1 <= 7 degrees of freedom: above 40 once in a million trials
    assert ((counts - expected) ** 2 / expected).sum() < 40


def test_other_dtypes_are_refused(backend):
    with pytest.raises(ValueError, match="x: expected int64, found torch.int32"):
        mix64(torch.zeros(3, dtype=torch.int32))


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_equals_the_definition(threads):
    x = torch.cat([torch.tensor(EXTREMES), random_ids(300_001)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = mix64(x), unmix64(x)
    finally:
        torch.set_num_threads(before)
    with use_backend("reference"):
        assert found[0].equal(mix64(x)) and found[1].equal(unmix64(x))
    torch.library.opcheck(torch.ops.tessera.mix64.default, (x[:6].view(2, 3).t(),))
    torch.library.opcheck(torch.ops.tessera.unmix64.default, (x[:6],))
