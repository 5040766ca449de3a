import pytest
import torch
import torch.nn.functional as F

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.pool import pool, sum_by_row

needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")


def bags(seed, rows, count, longest, weighted):
    """index, offsets and weights of `count` bags of 0 to `longest` ids among `rows`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (count,), generator=generator)
    offsets = torch.cat([torch.tensor([0]), lengths.cumsum(0)])
    index = torch.randint(0, rows, (int(offsets[-1]),), generator=generator)
    weights = torch.randn(index.shape, generator=generator) if weighted else None
    return index, offsets, weights


def pool_one(values, index, offsets, weights=None):
    """[B, w]: the sums of bags of one key, of one group."""
    (sums,) = pool(values, index, offsets, weights)
    return sums[:, 0]


def pooled_and_gradients(work, values, seed=5):
    values = values.clone().requires_grad_()
    found = work(values)
    found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)))
    return found.detach(), values.grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("longest", [1, 9])
@pytest.mark.parametrize("width", [1, 8, 16, 17, 21, 32])
def test_equals_embedding_bag_forward_and_backward(backend, weighted, longest, width):
    index, offsets, weights = bags(2, 50, 70, longest, weighted)
    values = torch.randn(50, width)

    def torchs(values):
        return F.embedding_bag(index, values, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)

    found = pooled_and_gradients(lambda values: pool_one(values, index, offsets, weights), values)
    expected = pooled_and_gradients(torchs, values)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert found[0][offsets.diff() == 0].eq(0).all()
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[index] = False
    assert found[1][untouched].eq(0).all()


def test_positions_outside_of_bags_and_nothing_at_all(backend):
    values, index = torch.randn(2, 3), torch.tensor([1, 0, 1, 0])
    found, gradients = pooled_and_gradients(lambda v: pool_one(v, index, torch.tensor([1, 3, 3])), values)
    assert found.equal(torch.stack([values[0] + values[1], torch.zeros(3)]))
    assert gradients[0].equal(gradients[1])
    no_rows = torch.zeros(0, dtype=torch.int64)
    found, gradients = pooled_and_gradients(lambda v: pool_one(v, no_rows, torch.tensor([0, 0])), torch.zeros(0, 3))
    assert found.equal(torch.zeros(1, 3)) and gradients.shape == (0, 3)


def test_refused_arguments(backend):
    values, index = torch.randn(4, 2), torch.tensor([1, 2])
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match=f"(index|inverse): expected below 4, found .*{wrong}"):
            pool(values, torch.tensor([wrong]), torch.tensor([0, 1]))
    for offsets in ([0, 3], [0, 2, 1], [-1, 1]):
        with pytest.raises(IndexError, match="offsets must not decrease"):
            pool(values, index, torch.tensor(offsets))
    with pytest.raises(ValueError, match="offsets: expected int64"):
        pool(values, index, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="offsets: expected as many bags of each of 2 keys, found 1"):
        pool(values, index, torch.tensor([0, 2]), None, 2)
    with pytest.raises(ValueError, match=r"widths: expected 2 columns together, found \[2, 1\]"):
        pool(values, index, torch.tensor([0, 2]), None, 1, [2, 1])
    with pytest.raises(ValueError, match="weights: expected float32"):
        pool(values, index, torch.tensor([0, 2]), torch.ones(3))
    with pytest.raises(ValueError, match="values: expected float32"):
        pool(values.double(), index, torch.tensor([0, 2]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("widths", [[17], [16, 1], [1, 8, 3]])
@pytest.mark.parametrize("keys", [1, 3])
def test_groups_of_columns_and_keys_are_cuts_of_one_pool(backend, keys, widths, weighted):
    batch = 37
    index, offsets, weights = bags(8, 60, keys * batch, 3, weighted)
    values = torch.randn(60, sum(widths))
    generator = torch.Generator().manual_seed(9)
    # Gradients as towers give them: a part of the fields, transposed, and one number for all.
    wide = [torch.randn(batch, keys + 2, width, generator=generator) for width in widths]
    grads = [wide[0][:, 1:-1], *(part.transpose(0, 1)[1:-1].contiguous().transpose(0, 1) for part in wide[1:])]
    grads[-1] = grads[-1][:1, :1, :1].expand_as(grads[-1])
    one, whole = (values.clone().requires_grad_() for _ in range(2))
    found = pool(one, index, offsets, weights, keys, widths)
    torch.autograd.backward(found, grads)
    expected = pool_one(whole, index, offsets, weights).view(keys, batch, -1).transpose(0, 1)
    expected.backward(torch.cat(grads, 2))
    assert [sums.shape for sums in found] == [(batch, keys, width) for width in widths]
    assert all(sums.is_contiguous() for sums in found)
    assert torch.cat(found, 2).equal(expected) and one.grad.equal(whole.grad)


def test_a_group_that_nobody_reads_and_an_empty_batch(backend):
    values = torch.randn(3, 3).requires_grad_()
    v, _ = pool(values, torch.tensor([0, 2]), torch.tensor([0, 1, 2]), None, 2, [2, 1])
    v.sum().backward()
    assert values.grad.equal(torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 1, 0]]))
    nothing = torch.zeros(0, dtype=torch.int64)
    v, w = pool(values, nothing, torch.tensor([0]), None, 2, [2, 1])
    assert v.shape == (0, 2, 2) and w.shape == (0, 2, 1)
    (v.sum() + w.sum()).backward()


@needs_cpp
def test_compiled_equals_the_definition_on_any_number_of_threads(on_threads):
    index, offsets, weights = bags(3, 3_000, 9_000, 4, weighted=True)
    values = torch.randn(3_000, 18)

    def work():
        return pooled_and_gradients(lambda values: pool_one(values, index, offsets, weights), values)

    with use_backend("reference"):
        expected = work()
    for threads in (1, 2):
        assert all(a.equal(b) for a, b in zip(on_threads(threads, work), expected, strict=True))


@needs_cpp
def test_schemas_and_fake_kernels():
    values, index, offsets = torch.randn(4, 3), torch.tensor([0, 3, 1]), torch.tensor([0, 1, 3])
    ops = torch.ops.tessera
    for weights in (None, torch.ones(3)):
        torch.library.opcheck(ops.pool.default, (values, index, offsets, weights, 2, [2, 1]))
        grads = [torch.ones(1, 2, 2), torch.ones(1, 2, 1)]
        torch.library.opcheck(ops.pool_backward.default, (grads, index, offsets, weights, 4))


def test_sums_by_row_are_taken_in_order(backend):
    """Up to 64 values of a row the bits are those of one sum after the other; on a GPU, more are summed in pieces."""
    generator = torch.Generator().manual_seed(3)
    index = torch.cat([torch.randint(0, 40, (300,), generator=generator), torch.full((150,), 40)])
    index = index[torch.randperm(len(index), generator=generator)]
    values = torch.randn((len(index), 5), generator=generator)
    sums = sum_by_row(values, index, 43)
    expected = torch.zeros(43, 5)
    for row, value in zip(index.tolist(), values, strict=True):
        expected[row] += value
    few = torch.arange(43) != 40
    assert sums[few].equal(expected[few]) and not sums[41:].any()
    if backend in ("triton", "triton-gpu"):
        expected[40] = sum(piece.cumsum(0)[-1] for piece in values[index == 40].split(64))
        torch.testing.assert_close(sums[40], expected[40])
        assert sums.equal(sum_by_row(values, index, 43))
    else:
        assert sums[40].equal(expected[40])
    assert sum_by_row(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 2).equal(torch.zeros(2, 5))


def test_sums_by_row_refuse_what_does_not_fit(backend):
    with pytest.raises(ValueError, match=r"values: expected float32 \[2, w\], found torch.float32 \[3, 1\]"):
        sum_by_row(torch.ones(3, 1), torch.tensor([0, 1]), 2)
    with pytest.raises(IndexError):
        sum_by_row(torch.ones(2, 1), torch.tensor([0, 2]), 2)
