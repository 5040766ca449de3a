import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.initialise import InitialValues, init_rows
from tessera.kernels.random import normal, stream, uniform
from tests.kernels.tables import EXTREMES, some_rows, table

needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")


@pytest.mark.parametrize(("distribution", "draw"), [("uniform", uniform), ("normal", normal)])
@pytest.mark.parametrize("dim", [1, 7, 16])
def test_rows_hold_the_numbers_of_their_ids(backend, distribution, draw, dim):
    chunks, dense = table(60, dim + 3)
    ids = torch.cat([torch.tensor(EXTREMES), torch.arange(35) * 7919])
    rows = some_rows(40, 60, distinct=True)
    init_rows(chunks, rows, ids, dim, InitialValues(distribution, -0.5, 0.25, state=0.125), stream=stream(3, 9))
    known = rows >= 0
    dense[rows[known], :dim] = -0.5 + 0.25 * draw(3, 9, ids, dim)[known]
    dense[rows[known], dim:] = 0.125
    assert torch.cat(chunks).equal(dense)


def test_constant(backend):
    chunks, _ = table(8, 3)
    init_rows(chunks, torch.arange(8), torch.arange(8), 2, InitialValues("uniform", 0.1, 0), stream=0)
    assert chunks[0][:, :2].eq(0.1).all() and chunks[0][:, 2].eq(0).all()


def test_refused_arguments(backend):
    chunks, _ = table(8, 3)
    rows, initial = torch.tensor([1, 2]), InitialValues("normal", 0.0, 1.0)
    with pytest.raises(ValueError, match="distribution: expected one of uniform, normal, found 'cauchy'"):
        init_rows(chunks, rows, rows, 2, InitialValues("cauchy", 0.0, 1.0), stream=0)
    with pytest.raises(ValueError, match="ids: expected 2"):
        init_rows(chunks, rows, rows[:1], 2, initial, stream=0)
    with pytest.raises(ValueError, match="chunks: expected"):
        init_rows(chunks, rows, rows, 4, initial, stream=0)
    with pytest.raises(IndexError, match="rows: expected below 8, found 8"):
        init_rows(chunks, rows + 6, rows, 2, initial, stream=0)


@needs_cpp
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_compiled_equals_the_definition_on_any_number_of_threads(on_threads, distribution):
    rows = some_rows(4_000, 5_000, distinct=True)

    def work():
        chunks, _ = table(5_000, 17, chunk_rows=512)
        init_rows(chunks, rows, rows * 31, 16, InitialValues(distribution, 0.1, 0.3), stream=stream(1, 2))
        return torch.cat(chunks)

    with use_backend("reference"):
        expected = work()
    one, two = on_threads(1, work), on_threads(2, work)
    assert one.equal(two)
    torch.testing.assert_close(one, expected, rtol=2.0**-22, atol=1e-7)


@needs_cpp
def test_schema_and_fake_kernel():
    chunks, _ = table(8, 3)
    rows = torch.tensor([1, -1])
    torch.library.opcheck(torch.ops.tessera.init_rows.default, (chunks, rows, rows, 2, "normal", [0.0, 1.0, 0.0], 77))
