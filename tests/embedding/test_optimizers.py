"""Every optimizer on rows of a table against torch.optim or its formula on a dense copy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.table import DynamicTable
from tests.embedding.conftest import both_kinds

pytestmark = [both_kinds, pytest.mark.usefixtures("of_table")]

N, STEPS = 40, 12
GROUPS = (Group("v", 5, 0.3), Group("w", 1, 0.1))
IDS = torch.arange(N) * 7919 - 2**62


def train(optimizer, touched_of_step):
    """Returns (rows after training, rows before, gradients per step [N, 6], 0 where not touched)."""
    table = DynamicTable(DynamicTableConfig("t", ("f",), GROUPS, optimizer, chunk_rows=16))
    start = table.gather(table.lookup(IDS, 0))
    generator, all_grads = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        touched = touched_of_step(step)
        inverse = torch.cat([torch.arange(len(touched)), torch.randint(len(touched), (30,), generator=generator)])
        grads = torch.randn((len(inverse), 6), generator=generator)
        table.update(table.lookup(IDS[touched], step), grads, inverse)
        all_grads.append(torch.zeros((N, 6)).index_add_(0, touched[inverse], grads))
    return table.gather(table.lookup(IDS, 0, training=False)), start, all_grads


def every_row(step):
    return torch.arange(N)


def some_rows(step):
    return torch.randperm(N, generator=torch.Generator().manual_seed(step))[: N // 3]


def dense(make, start, all_grads, touched_of_step):
    """torch.optim on a dense copy; with weight decay only touched rows move, so each row has its own optimizer."""
    rows = [torch.nn.Parameter(row.clone()) for row in start]
    optimizers = [make([row]) for row in rows]
    for step, grads in enumerate(all_grads):
        for i in touched_of_step(step).tolist():
            rows[i].grad = grads[i]
            optimizers[i].step()
    return torch.stack([row.detach() for row in rows])


TORCH = {
    "sgd": (RowOptimizer("sgd", lr=0.1), lambda p, decay: torch.optim.SGD(p, 0.1, weight_decay=decay)),
    "adagrad": (
        RowOptimizer("adagrad", lr=0.1, eps=1e-8, initial_accumulator=0.2),
        lambda p, decay: torch.optim.Adagrad(p, 0.1, eps=1e-8, initial_accumulator_value=0.2, weight_decay=decay),
    ),
    "adam": (
        RowOptimizer("adam", lr=0.05, beta1=0.8, beta2=0.95, eps=1e-7),
        lambda p, decay: torch.optim.Adam(p, 0.05, (0.8, 0.95), 1e-7, weight_decay=decay),
    ),
}


@pytest.mark.parametrize("touched_of_step", [every_row, some_rows])
@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("name", TORCH)
def test_equals_torch_optim_on_touched_rows(backend, name, decay, touched_of_step):
    optimizer, make = TORCH[name]
    optimizer = RowOptimizer(**{**vars(optimizer), "weight_decay": decay})
    found, start, grads = train(optimizer, touched_of_step)
    expected = dense(lambda p: make(p, decay), start, grads, touched_of_step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, start)


@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_rowwise_adagrad_equals_its_formula(backend, decay):
    found, start, grads = train(
        RowOptimizer("rowwise_adagrad", lr=0.1, eps=1e-6, initial_accumulator=0.1, weight_decay=decay), some_rows
    )
    w = start.double().numpy()
    for group in (slice(0, 5), slice(5, 6)):  # each group has its own mean of squares
        s = np.full(N, 0.1)
        for step, grad in enumerate(grads):
            at = some_rows(step).numpy()
            g = grad.double().numpy()[at, group] + decay * w[at, group]
            s[at] += (g * g).mean(axis=1)
            w[at, group] -= 0.1 * g / (np.sqrt(s[at]) + 1e-6)[:, None]
    np.testing.assert_allclose(found.numpy(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_ftrl_equals_its_formula(backend, decay):
    lr, beta, l1, l2 = 0.2, 1.0, 0.3, 0.1
    found, start, grads = train(RowOptimizer("ftrl", lr=lr, beta=beta, l1=l1, l2=l2, weight_decay=decay), some_rows)
    w = start.double().numpy()
    z, n = -w * (beta / lr + l2) - np.sign(w) * l1, np.zeros_like(w)
    for step, grad in enumerate(grads):
        at = some_rows(step).numpy()
        g = grad.double().numpy()[at] + decay * w[at]
        sigma = (np.sqrt(n[at] + g * g) - np.sqrt(n[at])) / lr
        z[at] += g - sigma * w[at]
        n[at] += g * g
        w[at] = np.where(np.abs(z[at]) <= l1, 0, -(z[at] - np.sign(z[at]) * l1) / ((beta + np.sqrt(n[at])) / lr + l2))
    np.testing.assert_allclose(found.numpy(), w, rtol=2e-6, atol=1e-6)
    assert (found == 0).any(), "l1 leaves some weights at zero"


def test_a_learning_rate_given_with_the_step_replaces_the_configured_one(backend):
    table = DynamicTable(DynamicTableConfig("t", ("f",), GROUPS, RowOptimizer("sgd", lr=0.1)))
    rows = table.lookup(IDS, 0)
    start = table.gather(rows)
    table.update(rows, torch.ones((N, 6)), lr=0.5)
    torch.testing.assert_close(table.gather(rows), start - 0.5)


def test_ids_without_a_row_take_no_gradient(backend):
    table = DynamicTable(DynamicTableConfig("t", ("f",), GROUPS, RowOptimizer("sgd", lr=0.1)))
    rows = table.lookup(IDS, 0)
    before = table.gather(rows)
    rows[::2] = -1
    table.update(rows, torch.ones((N, 6)))
    after = table.gather(table.lookup(IDS, 0, training=False))
    torch.testing.assert_close(after[1::2], before[1::2] - 0.1)
    assert torch.equal(after[::2], before[::2])


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl"])
@pytest.mark.parametrize("format", ["fp32", "low"])
def test_gradients_of_rows_are_clipped_once_they_are_merged(name, format):
    """Positions of one row add up before its norm counts: the bits are those of a table that is given the sums, each
    scaled by hand, in float64, and rows below the bound are left alone. Old rows and decay are no exception."""
    format = {"low": "fp16" if name == "ftrl" else "int8"}.get(format, format)
    optimizer = RowOptimizer(name, lr=0.05, decay=0.1, old_rows_factor=1.0 if name == "ftrl" else 0.5)
    groups = (Group("v", 5, 0.3, format, scale=0.01), Group("w", 1, 0.1))
    kinds = (replace(optimizer, clip_norm=1.5), optimizer)
    clips, plain = (DynamicTable(DynamicTableConfig("t", ("f",), groups, one, chunk_rows=16)) for one in kinds)
    generator = torch.Generator().manual_seed(3)
    shares = []
    for step in range(6):
        if step == 3:
            for table in (clips, plain):
                table.begin_period()
        touched = some_rows(step)
        inverse = torch.cat([torch.arange(len(touched)), torch.randint(len(touched), (9,), generator=generator)])
        grads = torch.randn((len(inverse), 6), generator=generator) * 0.5
        clips.update(clips.lookup(IDS[touched], step), grads, inverse)
        sums = torch.zeros(len(touched), 6).index_add_(0, inverse, grads)
        norms = sums.double().norm(dim=1)
        shares.append((norms > 1.5).float().mean())
        scaled = torch.where(norms[:, None] > 1.5, sums * (1.5 / norms[:, None]).float(), sums)
        plain.update(plain.lookup(IDS[touched], step), scaled)
    assert 0.05 < torch.stack(shares).mean() < 0.95
    found, expected = (table.gather(table.lookup(IDS, 0, training=False)) for table in (clips, plain))
    assert found.equal(expected)
