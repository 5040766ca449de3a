import math

import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.random import normal, uniform
from tessera.kernels.reference.mix import mix64_number


def some_ids():
    return torch.arange(-5_000, 5_000) * 7919


def bits_of(seed, table, id_, column, step):
    """The formulas of kernels/random.py on Python integers."""
    golden = 0x9E3779B97F4A7C15
    stream = mix64_number(mix64_number(mix64_number(seed + golden) + table + golden) + step + golden)
    row = mix64_number(mix64_number(id_ + golden) ^ stream)
    return mix64_number(row + (column + 1) * golden)


@pytest.mark.parametrize(("seed", "table", "step"), [(0, 0, 0), (2**64 - 1, -(2**63), 10**6), (-1, 2**63, 3)])
def test_formula_on_python_integers(backend, seed, table, step):
    ids = [0, 1, -1, 2**63 - 1, -(2**63), 12345]
    expected = [[(bits_of(seed, table, i, c, step) >> 40) * 2.0**-24 for c in range(5)] for i in ids]
    assert uniform(seed, table, torch.tensor(ids), 5, step).tolist() == expected
    for row, id_ in zip(normal(seed, table, torch.tensor(ids), 3, step).tolist(), ids, strict=True):
        u = [(bits_of(seed, table, id_, c, step) >> 11) * 2.0**-53 for c in range(4)]
        radius, other = (math.sqrt(-2 * math.log(x + 2.0**-53)) for x in (u[0], u[2]))
        angle, last = 2 * math.pi * u[1], 2 * math.pi * u[3]
        exact = [radius * math.cos(angle), radius * math.sin(angle), other * math.cos(last)]
        assert row == pytest.approx(exact, rel=2.0**-23)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_row_depends_on_nothing_but_its_key(backend, draw):
    ids = some_ids()
    whole = draw(3, 11, ids, 9)
    order = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(1))
    assert draw(3, 11, ids[order], 9).equal(whole[order])
    assert draw(3, 11, ids[42:43], 9).equal(whole[42:43])
    assert draw(3, 11, ids[::3], 4).equal(whole[::3, :4])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert draw(3, 11, ids, 9).equal(whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_every_part_of_the_key_matters(backend, draw):
    ids = some_ids()
    base = draw(3, 11, ids, 8)
    for seed, table, more, step in ((4, 11, 0, 0), (3, 12, 0, 0), (3, 11, 1, 0), (3, 11, 0, 1)):
        other = draw(seed, table, ids + more, 8, step)
        pair = torch.stack([base.flatten(), other.flatten()]).double()
        # 80,000 independent pairs: the correlation has a standard deviation of 0.0035
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02
    columns = torch.corrcoef(base.double().t()) - torch.eye(8, dtype=torch.float64)
    assert columns.abs().max() < 0.06  # 10,000 rows: standard deviation 0.01


def test_distribution_of_uniform(backend):
    x = uniform(0, 1, torch.arange(20_000), 10).double().flatten()
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 0.5) < 0.004 and abs(x.var() - 1 / 12) < 0.002  # 6 standard deviations
    counts = torch.histc(x, bins=50, min=0, max=1)
    assert ((counts - 4_000) ** 2 / 4_000).sum() < 115  # chi-square, 49 degrees of freedom: once in a million


def test_distribution_of_normal(backend):
    x = normal(0, 1, torch.arange(20_000), 10).double().flatten()
    assert abs(x.mean()) < 0.014 and abs(x.var() - 1) < 0.02
    assert abs((x**3).mean()) < 0.06 and abs((x**4).mean() - 3) < 0.15
    share = torch.special.ndtr(x)  # uniform if x is normal
    counts = torch.histc(share, bins=50, min=0, max=1)
    assert ((counts - 4_000) ** 2 / 4_000).sum() < 115
    assert x.abs().max() > 4  # of 200,000 numbers, 13 are expected


def test_empty_and_refused_arguments(backend):
    assert uniform(0, 0, torch.zeros(0, dtype=torch.int64), 3).shape == (0, 3)
    assert normal(0, 0, torch.zeros(0, dtype=torch.int64), 3).shape == (0, 3)
    for draw in (uniform, normal):
        with pytest.raises(ValueError, match="ids: expected int64"):
            draw(0, 0, torch.zeros(3), 2)
        with pytest.raises(ValueError, match="dim: expected at least 1, found 0"):
            draw(0, 0, torch.zeros(3, dtype=torch.int64), 0)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
@pytest.mark.parametrize("dim", [1, 2, 7, 16, 40])
def test_compiled_equals_the_definition(dim):
    ids = some_ids()
    flat, bell = uniform(5, 6, ids, dim, 2), normal(5, 6, ids, dim, 2)
    with use_backend("reference"):
        assert flat.equal(uniform(5, 6, ids, dim, 2))
        torch.testing.assert_close(bell, normal(5, 6, ids, dim, 2), rtol=2.0**-23, atol=0)
    torch.library.opcheck(torch.ops.tessera.uniform.default, (9, ids[:5], dim))
    torch.library.opcheck(torch.ops.tessera.normal.default, (9, ids[:5], dim))
