import pytest
import torch

from kernels.backend import available_backends, use_backend
from kernels.gather import gather, gather_pooled
from kernels.scatter import scatter
from tests.kernels.tables import some_rows, table

NO_ROWS = torch.zeros(0, dtype=torch.int64)
needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")


def read(dense, rows, default):
    """dense[row], or the default for -1, one by one."""
    return torch.stack([default if r < 0 else dense[r] for r in rows.tolist()])


@pytest.mark.parametrize("dim", [1, 3, 8, 16, 32, 64, 150])
@pytest.mark.parametrize("default", [False, True])
def test_gather_reads_rows(backend, dim, default):
    chunks, dense = table(60, dim + 2)
    rows = some_rows(200, 60)
    fallback = torch.randn(dim) if default else None
    expected = read(dense[:, 1 : dim + 1], rows, fallback if default else torch.zeros(dim))
    assert gather(chunks, rows, dim, default=fallback, begin=1).equal(expected)
    inverse = torch.randint(0, 200, (333,), generator=torch.Generator().manual_seed(1))
    assert gather(chunks, rows, dim, inverse, fallback, 1).equal(expected[inverse])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.uint8])
def test_gather_keeps_the_type(backend, dtype):
    chunks, dense = table(20, 3, dtype=dtype)
    rows = torch.tensor([19, 0, -1, 7])
    expected = read(dense, rows, torch.zeros(3, dtype=dtype))
    found = gather(chunks, rows, 3)
    assert found.dtype == dtype and found.equal(expected)


def test_gather_without_rows(backend):
    chunks, _ = table(8, 4)
    assert gather(chunks, NO_ROWS, 4).shape == (0, 4)
    assert gather([], torch.tensor([-1, -1]), 3).equal(torch.zeros(2, 3))
    assert gather([], torch.tensor([-1]), 2, torch.tensor([0, 0]), torch.ones(2)).equal(torch.ones(2, 2))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dim", [1, 16, 21])
def test_pooling_equals_embedding_bag(backend, weighted, mode, dim):
    chunks, dense = table(60, dim)
    generator = torch.Generator().manual_seed(2)
    rows = some_rows(50, 60, distinct=True)
    lengths = torch.randint(0, 9, (70,), generator=generator)
    offsets = torch.cat([torch.tensor([0]), lengths.cumsum(0)])
    inverse = torch.randint(0, 50, (int(offsets[-1]),), generator=generator)
    weights = torch.randn(inverse.shape, generator=generator) if weighted else None
    found = gather_pooled(chunks, rows, inverse, offsets, dim, weights, mode == "mean")
    values = torch.cat([dense, torch.zeros(1, dim)])[rows[inverse]]
    expected = torch.nn.functional.embedding_bag(
        torch.arange(inverse.numel()),
        values,
        offsets,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )
    if mode == "mean":
        expected = expected / lengths.clamp(min=1)[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert found[lengths == 0].eq(0).all()


def test_pooling_reads_the_default_and_a_slice_of_positions(backend):
    chunks, dense = table(8, 2)
    rows, inverse = torch.tensor([3, -1]), torch.tensor([1, 0, 1, 0])
    default = torch.tensor([5.0, 7.0])
    found = gather_pooled(chunks, rows, inverse, torch.tensor([1, 3, 3]), 2, default=default)
    assert found.equal(torch.stack([dense[3] + default, torch.zeros(2)]))
    none = gather_pooled([], torch.tensor([-1]), NO_ROWS, torch.tensor([0, 0]), 2)
    assert none.equal(torch.zeros(1, 2))


def test_scatter_writes_rows(backend):
    chunks, dense = table(60, 7)
    rows = some_rows(40, 60, distinct=True)
    values = torch.randn(40, 3)
    scatter(chunks, rows, values, begin=2)
    dense[rows[rows >= 0], 2:5] = values[rows >= 0]
    assert torch.cat(chunks).equal(dense)
    scatter(chunks, rows, torch.zeros(1, 7))
    dense[rows[rows >= 0]] = 0
    assert torch.cat(chunks).equal(dense)
    scatter(chunks, NO_ROWS, torch.zeros(0, 7))
    assert gather(chunks, torch.arange(64), 7).equal(dense)


def test_refused_arguments(backend):
    chunks, _ = table(16, 4)
    rows = torch.tensor([1, 2])
    with pytest.raises(IndexError, match="rows: expected below 16, found 16"):
        gather(chunks, torch.tensor([16]), 4)
    with pytest.raises(IndexError, match="rows: expected below 0, found 0"):
        gather([], torch.tensor([0]), 4)
    with pytest.raises(IndexError, match="inverse: expected"):
        gather(chunks, rows, 4, torch.tensor([0, 2]))
    with pytest.raises(IndexError, match="inverse: expected"):
        gather_pooled(chunks, rows, torch.tensor([-1]), torch.tensor([0, 1]), 4)
    with pytest.raises(IndexError, match="offsets must not decrease"):
        gather_pooled(chunks, rows, torch.tensor([0]), torch.tensor([0, 2]), 4)
    with pytest.raises(IndexError, match="rows: expected below 16, found 99"):
        scatter(chunks, torch.tensor([99]), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="chunks: expected"):
        gather(chunks, rows, 5)
    with pytest.raises(ValueError, match="chunks: expected"):
        gather([torch.zeros(6, 4)], rows, 4)
    with pytest.raises(ValueError, match="default: expected torch.float32"):
        gather(chunks, rows, 4, default=torch.zeros(3))
    with pytest.raises(ValueError, match="rows: expected int64"):
        gather(chunks, rows.int(), 4)
    with pytest.raises(ValueError, match="weights: expected float32"):
        gather_pooled(chunks, rows, rows, torch.tensor([0, 2]), 4, weights=torch.ones(3))
    with pytest.raises(ValueError, match="values: expected torch.float32"):
        scatter(chunks, rows, torch.zeros(2, 4, dtype=torch.float64))


@needs_cpp
def test_compiled_equals_the_definition_on_any_number_of_threads(on_threads):
    chunks, _ = table(5_000, 20, chunk_rows=512)
    rows = some_rows(3_000, 5_000, distinct=True)
    generator = torch.Generator().manual_seed(3)
    inverse = torch.randint(0, 3_000, (20_000,), generator=generator)
    offsets = torch.arange(0, 20_001, 4)
    weights = torch.rand(20_000, generator=generator)

    def work():
        pooled = gather_pooled(chunks, rows, inverse, offsets, 18, weights, True)
        return gather(chunks, rows, 18, inverse), pooled

    with use_backend("reference"):
        expected = work()
    for threads in (1, 2):
        assert all(a.equal(b) for a, b in zip(on_threads(threads, work), expected, strict=True))


@needs_cpp
def test_schemas_and_fake_kernels():
    chunks, _ = table(16, 4)
    rows, inverse, offsets = torch.tensor([3, -1, 9]), torch.tensor([0, 2, 1]), torch.tensor([0, 1, 3])
    ops = torch.ops.tessera
    torch.library.opcheck(ops.gather.default, (chunks, rows, 3, inverse, torch.ones(3), 1))
    torch.library.opcheck(ops.gather.default, (chunks, rows, 3, None, None, 0))
    torch.library.opcheck(ops.gather_pooled.default, (chunks, rows, inverse, offsets, 3, torch.ones(3), True, None))
    torch.library.opcheck(ops.scatter.default, (chunks, rows, torch.ones(3, 2), 1))
