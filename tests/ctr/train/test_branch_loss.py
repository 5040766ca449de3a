"""Losses of a tower's branches: their formulas by autograd over the whole batch, and on two ranks like on one."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.ctr.data.labels import labels_of
from tessera.ctr.models.fcn import FCN
from tessera.ctr.models.final_net import FinalNet
from tessera.ctr.models.tower import Fields, Tower
from tessera.ctr.train.task_loss import TaskLoss
from tests.ctr.train.test_task_loss import batch_of
from tests.ranks import on_ranks

ROWS = 40


class Worse(Tower):
    branch_loss = "worse"


class Agreement(Tower):
    branch_loss = "agreement"


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of both branches [2, ROWS], of which the second is worse than the mean of both, labels and weights."""
    generator = torch.Generator().manual_seed(3)
    values = (torch.rand(ROWS, generator=generator) < 0.4).double()
    noise = torch.randn(2, ROWS, generator=generator, dtype=torch.float64)
    logits = noise + torch.tensor([[2.0], [-2.0]]) * (2 * values - 1)
    return logits.requires_grad_(), values, torch.rand(ROWS, generator=generator, dtype=torch.float64)


def formula(kind: str, logits: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mean over the whole batch, as the papers have it."""

    def mean(logit, target):
        return F.binary_cross_entropy_with_logits(logit, target, weight, reduction="sum") / weight.sum()

    together = logits.mean(0)
    plain, branches = mean(together, values), [mean(one, values) for one in logits]
    if kind == "worse":
        return plain + sum((one - plain).clamp(min=0) * one for one in branches)
    return plain + sum(mean(one, torch.sigmoid(together).detach()) for one in logits)


def of_rows(kind: str, rows: slice, rank: int = 0, divisor: str = "batch"):
    """This rank's part of the loss times the whole batch's weight, and its gradient by the branches' logits."""
    logits, values, weight = drawn()
    tower = Worse() if kind == "worse" else Agreement()
    tower.branches = tuple(logits[:, rows])
    loss = TaskLoss(labels_of(["click"]), tower, rank, divisor)
    batch = batch_of(values[rows, None], weight=weight[rows])
    found = loss(logits[:, rows].mean(0), batch, float(weight.sum()))
    assert tower.branches == ()  # they are used once
    return found.detach(), torch.autograd.grad(found, logits)[0]


def check(kind: str, found: torch.Tensor, gradient: torch.Tensor) -> None:
    logits, values, weight = drawn()
    expected = formula(kind, logits, values, weight)
    torch.testing.assert_close(found / weight.sum(), expected.detach())
    torch.testing.assert_close(gradient / weight.sum(), torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("divisor", ["batch", "task"])
@pytest.mark.parametrize("kind", ["worse", "agreement"])
def test_the_loss_is_the_papers(kind, divisor):
    check(kind, *of_rows(kind, slice(None), divisor=divisor))


class NoWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a number of the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("divisor", ["batch", "task"])
@pytest.mark.parametrize("kind", ["worse", "agreement"])
def test_a_weight_on_the_device_spares_the_host_waiting(kind, divisor):
    logits, values, weight = drawn()
    tower, batch = Worse() if kind == "worse" else Agreement(), batch_of(values[:, None], weight=weight)
    loss, found = TaskLoss(labels_of(["click"]), tower, 0, divisor), []
    for total in (weight.sum(), float(weight.sum())):
        tower.branches = tuple(logits)
        with NoWaits():
            found.append(loss(logits.mean(0), batch, total).detach())
    torch.testing.assert_close(found[0], found[1])


def of_rank(process, kind: str):
    return of_rows(kind, slice(0, 15) if process.rank == 0 else slice(15, None), process.rank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["worse", "agreement"])
def test_ranks_add_up_to_the_whole(kind):
    parts = on_ranks(2, of_rank, kind)
    check(kind, sum(found for found, _ in parts), sum(gradient for _, gradient in parts))


def test_branches_that_are_no_worse_leave_the_plain_loss():
    logits, values, weight = drawn()
    tower = Worse()
    tower.branches = (logits[0], logits[0])
    found = TaskLoss(labels_of(["click"]), tower)(logits[0], batch_of(values[:, None], weight=weight), ROWS)
    plain = F.binary_cross_entropy_with_logits(logits[0], values, weight, reduction="sum")
    assert found == plain
    assert torch.equal(*(torch.autograd.grad(one, logits)[0] for one in (found, plain)))


LABELS = ["click", {"name": "buy", "where": "click", "weight": 3.0}, {"name": "minutes", "loss": "mse", "weight": 0.1}]


def several(kind: str, rows: slice, rank: int = 0):
    """This rank's part of the loss to three labels, of which rows are unknown or out of their space, and gradients."""
    generator = torch.Generator().manual_seed(5)
    values = (torch.rand(ROWS, 3, generator=generator) < 0.4).double()
    known = torch.rand(ROWS, 3, generator=generator) < 0.8
    weight = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, ROWS, 3, generator=generator, dtype=torch.float64).requires_grad_()
    tower, values = Worse() if kind == "worse" else Agreement(), torch.where(known, values, 0.0)
    tower.branches = tuple(logits[:, rows])
    batch = batch_of(values[rows], known[rows], weight[rows])
    found = TaskLoss(labels_of(LABELS), tower, rank)(logits[:, rows].mean(0), batch, float(weight.sum()))
    gradient = torch.autograd.grad(found, logits)[0]
    return found.detach(), gradient, (logits, values, known, weight)


def check_several(kind: str, found: torch.Tensor, gradient: torch.Tensor, drawn) -> None:
    """By hand: each label's loss by itself, of the rows in which it counts, times its weight."""
    logits, values, known, weight = drawn
    total = torch.zeros((), dtype=torch.float64)
    for label, factor in enumerate((1.0, 3.0, 0.1)):
        mask = known[:, label] & (values[:, 0] == 1) if label == 1 else known[:, label]

        def mean(logit, target, of_number=label == 2, counted=weight * mask):
            each = F.mse_loss if of_number else F.binary_cross_entropy_with_logits
            return (counted * each(logit, target, reduction="none")).sum() / weight.sum()

        together, target = logits[..., label].mean(0), values[:, label]
        plain, parts = mean(together, target), logits[..., label]
        if kind == "worse":
            whole = plain + sum((mean(one, target) - plain).clamp(min=0) * mean(one, target) for one in parts)
        else:
            answer = together.detach() if label == 2 else together.detach().sigmoid()
            whole = plain + sum(mean(one, answer) for one in parts)
        total = total + factor * whole
    torch.testing.assert_close(found / weight.sum(), total.detach())
    torch.testing.assert_close(gradient / weight.sum(), torch.autograd.grad(total, logits)[0])


@pytest.mark.parametrize("kind", ["worse", "agreement"])
def test_each_of_several_labels_has_the_papers_loss_where_it_counts(kind):
    check_several(kind, *several(kind, slice(None)))


def several_of_rank(process, kind: str):
    return several(kind, slice(0, 15) if process.rank == 0 else slice(15, None), process.rank)[:2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["worse", "agreement"])
def test_ranks_add_up_to_the_whole_with_several_labels(kind):
    parts = on_ranks(2, several_of_rank, kind)
    check_several(kind, *(sum(one) for one in zip(*parts, strict=True)), several(kind, slice(None))[2])


def test_towers_tell_their_branches_in_training_alone():
    fields = Fields((), ("a", "b"))
    fcn = FCN(fields, 4, 1, 1, 1, 0.0, 0.0, layer_norm=True, batch_norm=False)
    final_net = FinalNet(fields, 4, [4], [4], "sum", 0.0, 0.0, gate=True, relu=True, batch_norm=False)
    for tower in (fcn, final_net):
        logit = tower(torch.zeros(3, 0), {"v": torch.randn(3, 2, 4)})
        torch.testing.assert_close(torch.stack(tower.branches).mean(0), logit)
        tower.branches = ()
        tower.eval()(torch.zeros(3, 0), {"v": torch.randn(3, 2, 4)})
        assert tower.branches == ()
