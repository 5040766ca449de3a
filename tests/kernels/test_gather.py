import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.copy_rows import copy_rows
from tessera.kernels.gather import gather
from tessera.kernels.scatter import scatter, scatter_columns
from tests.kernels.tables import some_rows, table

needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")


def no_rows():
    return torch.zeros(0, dtype=torch.int64)


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
    assert gather(chunks, no_rows(), 4).shape == (0, 4)
    assert gather([], torch.tensor([-1, -1]), 3).equal(torch.zeros(2, 3))
    assert gather([], torch.tensor([-1]), 2, torch.tensor([0, 0]), torch.ones(2)).equal(torch.ones(2, 2))


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
    scatter(chunks, no_rows(), torch.zeros(0, 7))
    assert gather(chunks, torch.arange(64), 7).equal(dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_tensors_side_by_side(backend, dtype):
    chunks, dense = table(60, 9, dtype=dtype)
    rows = some_rows(40, 60, distinct=True)
    parts = [part[:, 2:].to(dtype) for part in torch.randint(0, 99, (3, 40, 4)).unbind()]
    parts[1] = parts[1][:1]
    scatter_columns(chunks, rows, parts, begin=2)
    dense[rows[rows >= 0], 2:8] = torch.cat([parts[0], parts[1].expand(40, -1), parts[2]], dim=1)[rows >= 0]
    assert torch.cat(chunks).equal(dense)
    scatter_columns(chunks, rows, [torch.zeros(40, 9, dtype=dtype), torch.zeros(40, 0, dtype=dtype)])
    dense[rows[rows >= 0]] = 0
    assert torch.cat(chunks).equal(dense)
    scatter_columns(chunks, no_rows(), [torch.zeros(0, 9, dtype=dtype)])
    with pytest.raises(ValueError, match="chunks: expected"):
        scatter_columns(chunks, rows, [*parts, parts[0], parts[0]])
    with pytest.raises(ValueError, match=r"parts: expected .* \[40 or 1, k\]"):
        scatter_columns(chunks, rows, [parts[0][:39]])
    with pytest.raises(IndexError, match="rows: expected below 64, found 99"):
        scatter_columns(chunks, torch.tensor([99]), [parts[0][:1]])


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 7), (torch.int64, 4), (torch.uint8, 13)])
def test_rows_are_copied_to_another_table(backend, dtype, width):
    (source, dense), (target, expected) = table(60, width, dtype=dtype), table(96, width, 32, dtype, seed=1)
    rows, places = some_rows(40, 60, missing=0), some_rows(40, 96, seed=2, missing=0, distinct=True)
    copy_rows(source, rows, target, places)
    expected[places] = dense[rows]
    assert torch.cat(target).equal(expected) and torch.cat(source).equal(dense)
    copy_rows(source, no_rows(), target, no_rows())
    for wrong in (-1, 64):
        with pytest.raises(IndexError, match=f"rows: expected below 64, found .*{wrong}"):
            copy_rows(source, torch.tensor([wrong]), target, torch.tensor([0]))
    with pytest.raises(IndexError, match="places: expected below 96, found"):
        copy_rows(source, torch.tensor([0]), target, torch.tensor([96]))
    with pytest.raises(ValueError, match="target: expected"):
        copy_rows(source, rows, [torch.zeros(8, width + 1, dtype=dtype)], places)
    with pytest.raises(ValueError, match="places: expected 40, found 39"):
        copy_rows(source, rows, target, places[1:])


def test_refused_arguments(backend):
    chunks, _ = table(16, 4)
    rows = torch.tensor([1, 2])
    with pytest.raises(IndexError, match="rows: expected below 16, found 16"):
        gather(chunks, torch.tensor([16]), 4)
    with pytest.raises(IndexError, match="rows: expected below 0, found 0"):
        gather([], torch.tensor([0]), 4)
    with pytest.raises(IndexError, match="inverse: expected"):
        gather(chunks, rows, 4, torch.tensor([0, 2]))
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
    with pytest.raises(ValueError, match="values: expected torch.float32"):
        scatter(chunks, rows, torch.zeros(2, 4, dtype=torch.float64))


@needs_cpp
def test_compiled_equals_the_definition_on_any_number_of_threads(on_threads):
    chunks, _ = table(5_000, 20, chunk_rows=512)
    rows = some_rows(3_000, 5_000, distinct=True)
    generator = torch.Generator().manual_seed(3)
    inverse = torch.randint(0, 3_000, (20_000,), generator=generator)

    def work():
        return gather(chunks, rows, 18, inverse)

    with use_backend("reference"):
        expected = work()
    for threads in (1, 2):
        assert on_threads(threads, work).equal(expected)


@needs_cpp
def test_schemas_and_fake_kernels():
    chunks, _ = table(16, 4)
    rows, inverse = torch.tensor([3, -1, 9]), torch.tensor([0, 2, 1])
    ops = torch.ops.tessera
    torch.library.opcheck(ops.gather.default, (chunks, rows, 3, inverse, torch.ones(3), 1))
    torch.library.opcheck(ops.gather.default, (chunks, rows, 3, None, None, 0))
    torch.library.opcheck(ops.scatter.default, (chunks, rows, torch.ones(3, 2), 1))
    torch.library.opcheck(ops.scatter_columns.default, (chunks, rows, [torch.ones(3, 2), torch.ones(1, 1)], 1))
    torch.library.opcheck(ops.copy_rows.default, (chunks, rows.abs(), table(8, 4)[0], torch.tensor([2, 0, 7])))
