import math

import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.layout import plain_layout
from tessera.kernels.optimizers import OPTIMIZERS, OptimizerSettings, state_width
from tessera.kernels.update import update
from tests.kernels.tables import some_rows, table

LR = 0.05
needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")


def fresh_table(optimizer, rows, dim, more=0, state=0.0):
    chunks, _ = table(rows, dim + state_width(optimizer, dim) + more)
    for chunk in chunks:
        chunk[:, dim:] = state
    return chunks


def batches(steps, rows, dim, distinct=12, n=60):
    """Yield (rows [u] with -1 in it, inverse [n] that reaches all of them, gradients [n, dim])."""
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        chosen = some_rows(distinct, rows, seed=step, missing=0.1, distinct=True)
        inverse = torch.cat([torch.arange(distinct), torch.randint(0, distinct, (n - distinct,), generator=generator)])
        inverse = inverse[torch.randperm(n, generator=generator)]
        yield chosen, inverse, torch.randn((n, dim), generator=generator)


def run(optimizer, chunks, steps, rows, dim, **hyper):
    for chosen, inverse, grads in batches(steps, rows, dim):
        update(optimizer, chunks, chosen, grads, inverse, settings=OptimizerSettings(LR, **hyper))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dim", [1, 7, 8, 16, 32, 45])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_equals_torch_optim_on_a_dense_copy(backend, optimizer, dim, decay):
    """Every row of the dense copy has an optimizer of its own, which steps only when its row is touched."""
    rows = 24
    chunks = fresh_table(optimizer, rows, dim, more=2)
    copies = [torch.nn.Parameter(row.clone()) for row in torch.cat(chunks)[:, :dim]]
    classes = {
        "sgd": lambda p: torch.optim.SGD([p], lr=LR, weight_decay=decay),
        "adagrad": lambda p: torch.optim.Adagrad([p], lr=LR, eps=1e-8, weight_decay=decay),
        "adam": lambda p: torch.optim.Adam([p], lr=LR, betas=(0.8, 0.99), weight_decay=decay),
    }
    optimizers = [classes[optimizer](copy) for copy in copies]
    for chosen, inverse, grads in batches(20, rows, dim):
        for place, row in enumerate(chosen.tolist()):
            if row >= 0:
                copies[row].grad = grads[inverse == place].sum(dim=0)
                optimizers[row].step()
        settings = OptimizerSettings(LR, weight_decay=decay, beta1=0.8, beta2=0.99)
        update(optimizer, chunks, chosen, grads, inverse, settings=settings)
    dense = torch.cat(chunks)
    torch.testing.assert_close(dense[:, :dim], torch.stack(list(copies)).detach(), rtol=1e-6, atol=1e-6)
    assert dense[:, dim + state_width(optimizer, dim) :].eq(0).all()


def test_adam_counts_the_steps_of_each_row(backend):
    chunks = fresh_table("adam", 8, 2)
    for touched in ([0, 1], [1], [1]):
        update("adam", chunks, torch.tensor(touched), torch.ones(len(touched), 2), settings=OptimizerSettings(LR))
    assert chunks[0][:3, 6].tolist() == [1, 3, 0]


def test_adam_after_very_many_steps(backend):
    """The correction of late steps is computed apart; here it is still far from 1."""
    chunks = fresh_table("adam", 8, 4)
    chunks[0][0, 12] = 99_999
    update("adam", chunks, torch.tensor([0]), torch.ones(1, 4), settings=OptimizerSettings(LR, beta2=0.999999))
    w, m, v, t = (chunks[0][0, part] for part in (slice(4), slice(4, 8), slice(8, 12), 12))
    start = fresh_table("adam", 8, 4)[0][0, :4]
    expected = start - LR * 0.1 / (math.sqrt(1e-6) / math.sqrt(1 - 0.999999**100_000) + 1e-8)
    torch.testing.assert_close(w, expected, rtol=1e-5, atol=0)
    assert t == 100_000 and m.allclose(torch.tensor(0.1)) and v.allclose(torch.tensor(1e-6))


def test_rowwise_adagrad_equals_fbgemm(backend):
    training = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    rows, dim = 24, 16
    chunks = fresh_table("rowwise_adagrad", rows, dim)
    theirs = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)],
        optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
        eps=1e-6,
        device=torch.device("cpu"),
    )
    theirs.split_embedding_weights()[0].copy_(torch.cat(chunks)[:, :dim])
    for chosen, inverse, grads in batches(20, rows, dim):
        known = chosen[inverse] >= 0
        ids = chosen[inverse][known]
        theirs(ids, torch.arange(ids.numel() + 1)).backward(grads[known])
        update("rowwise_adagrad", chunks, chosen, grads, inverse, settings=OptimizerSettings(LR, eps=1e-6))
    dense = torch.cat(chunks)
    torch.testing.assert_close(dense[:, :dim], theirs.split_embedding_weights()[0], rtol=1e-6, atol=1e-6)
    state = theirs.split_optimizer_states()[0][0]
    torch.testing.assert_close(dense[:, dim], state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 8, 11, 16])
def test_rowwise_adagrad_with_weight_decay(backend, dim):
    chunks = fresh_table("rowwise_adagrad", 8, dim)
    w, s = chunks[0][5, :dim].double(), 0.0
    for grad in torch.randn((20, dim), generator=torch.Generator().manual_seed(0)):
        g = grad.double() + 0.1 * w
        s += float((g * g).mean())
        w -= LR * g / (math.sqrt(s) + 1e-8)
        update(
            "rowwise_adagrad", chunks, torch.tensor([5]), grad[None], settings=OptimizerSettings(LR, weight_decay=0.1)
        )
    expected = torch.cat([w, torch.tensor([s])]).float()
    torch.testing.assert_close(chunks[0][5], expected, rtol=1e-5, atol=1e-6)


def ftrl_by_the_paper(w, gradients, beta, l1, l2):
    """McMahan et al. 2013, algorithm 1, one coordinate in float64, started at w."""
    z, n = -w * (beta / LR + l2) - math.copysign(l1 if w else 0, w), 0.0
    for g in gradients:
        sigma = (math.sqrt(n + g * g) - math.sqrt(n)) / LR
        z += g - sigma * w
        n += g * g
        w = 0.0 if abs(z) <= l1 else -(z - math.copysign(l1, z)) / ((beta + math.sqrt(n)) / LR + l2)
    return w, z, n


@pytest.mark.parametrize(("l1", "l2", "start"), [(0.0, 0.0, 0.3), (0.5, 0.1, -0.3), (2.0, 1.0, 0.0)])
def test_ftrl_equals_the_paper(backend, l1, l2, start):
    dim = 8
    chunks = fresh_table("ftrl", 8, dim)
    chunks[0][3, :dim] = start
    gradients = torch.randn((30, dim), generator=torch.Generator().manual_seed(0))
    gradients[:3, 0] = 0  # a coordinate without gradient keeps its value
    for g in gradients:
        update("ftrl", chunks, torch.tensor([3]), g[None], settings=OptimizerSettings(LR, beta=1.5, l1=l1, l2=l2))
    expected = [ftrl_by_the_paper(start, gradients[:, c].tolist(), 1.5, l1, l2) for c in range(dim)]
    found = chunks[0][3].view(3, dim).t()
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-5, atol=2e-6)
    if l1 == 2.0:
        assert found[:, 0].eq(0).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_rows_are_left_alone_and_unknown_rows_skipped(backend, optimizer):
    chunks = fresh_table(optimizer, 24, 4)
    before = torch.cat(chunks)
    rows = torch.tensor([2, -1, 17])
    update(optimizer, chunks, rows, torch.ones(3, 4), settings=OptimizerSettings(LR))
    changed = (torch.cat(chunks) != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [2, 17]
    update(optimizer, chunks, rows[:0], torch.ones(0, 4), settings=OptimizerSettings(LR))
    update(optimizer, [], rows[1:2], torch.ones(1, 4), settings=OptimizerSettings(LR))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_inverse_in_any_order_with_gaps(backend, optimizer):
    """Rows need not come in order of first occurrence; one without a gradient counts as a zero gradient."""
    rows, inverse = torch.tensor([4, 9, 2, 20]), torch.tensor([3, 1, 3, 1, 1])
    grads = torch.randn((5, 3), generator=torch.Generator().manual_seed(0))
    one, other = fresh_table(optimizer, 24, 3), fresh_table(optimizer, 24, 3)
    update(optimizer, one, rows, grads, inverse, settings=OptimizerSettings(LR))
    merged = torch.zeros(4, 3).index_add_(0, inverse, grads)
    update(optimizer, other, rows, merged, settings=OptimizerSettings(LR))
    torch.testing.assert_close(torch.cat(one), torch.cat(other), rtol=1e-6, atol=1e-7)


def test_refused_arguments(backend):
    chunks = fresh_table("adagrad", 16, 4)
    rows, grads = torch.tensor([1, 2]), torch.ones(2, 4)
    with pytest.raises(ValueError, match="optimizer: expected one of sgd, adagrad"):
        update("lamb", chunks, rows, grads, settings=OptimizerSettings(LR))
    with pytest.raises(ValueError, match="chunks: expected torch.float32 .* 12 or more"):
        update("ftrl", chunks, rows, grads, settings=OptimizerSettings(LR))
    with pytest.raises(ValueError, match="grads: expected 2 rows, found 1"):
        update("sgd", chunks, rows, grads[:1], settings=OptimizerSettings(LR))
    with pytest.raises(ValueError, match="grads: expected float32"):
        update("sgd", chunks, rows, grads.double(), settings=OptimizerSettings(LR))
    with pytest.raises(IndexError, match="rows: expected below 16, found 16"):
        update("sgd", chunks, torch.tensor([1, 16]), grads, settings=OptimizerSettings(LR))
    with pytest.raises(IndexError, match="inverse: expected"):
        update("sgd", chunks, rows, grads, torch.tensor([0, 2]), settings=OptimizerSettings(LR))


@needs_cpp
@pytest.mark.parametrize("dim", [3, 8, 16, 32])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_compiled_equals_the_definition(optimizer, dim):
    tables = []
    for name in available_backends():
        with use_backend(name):
            chunks = fresh_table(optimizer, 24, dim)
            run(optimizer, chunks, 10, 24, dim, weight_decay=0.01)
            tables.append(torch.cat(chunks))
    for found in tables[1:]:
        torch.testing.assert_close(found, tables[0], rtol=2e-6, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_threads_change_no_bit(on_threads, optimizer):
    def work():
        chunks = fresh_table(optimizer, 4_000, 16)
        for chosen, inverse, grads in batches(2, 4_000, 16, distinct=3_000, n=10_000):
            update(optimizer, chunks, chosen, grads, inverse, settings=OptimizerSettings(LR))
        return torch.cat(chunks)

    assert on_threads(1, work).equal(on_threads(2, work))


@needs_cpp
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_schema_and_fake_kernel(optimizer):
    arguments = (torch.tensor([3, -1]), torch.ones(3, 2), torch.tensor([0, 1, 0]))
    layout, settings = list(plain_layout(2, optimizer)), list(OptimizerSettings(LR))
    chunks = fresh_table(optimizer, 16, 2)
    torch.library.opcheck(torch.ops.tessera.update.default, (chunks, *arguments, layout, settings))
