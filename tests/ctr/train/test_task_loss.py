"""Losses of labels against closed forms and a peer's functions, with masks and spaces, and on ranks like on one."""

import pytest
import torch
import torch.nn.functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tessera.ctr.data.batch import Batch
from tessera.ctr.data.columns import NULL_GROUP
from tessera.ctr.data.labels import labels_of
from tessera.ctr.models.tower import Tower
from tessera.ctr.train.task_loss import TaskLoss
from tessera.distributed.rank import Process
from tests.ranks import on_ranks

FUNNEL = ["click", {"name": "buy", "where": "click"}]


def batch_of(labels, known=None, weight=None, group=None) -> Batch:
    labels = torch.as_tensor(labels, dtype=torch.float64)
    rows = len(labels)
    ids = KeyedJaggedTensor(keys=[], values=torch.zeros(0), lengths=torch.zeros(0, dtype=torch.int32), stride=rows)
    weight = torch.ones(rows, dtype=torch.float64) if weight is None else weight
    return Batch(torch.zeros(rows, 0), ids, labels, weight, group, None, rows, known=known)


def loss_of(labels, logits, batch, tower=None, divisor="batch"):
    total = float(batch.weight.sum())
    return TaskLoss(labels_of(labels), tower or Tower(), 0, divisor)(logits, batch, total)


def random(rows: int = 60, labels: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, labels, generator=generator, dtype=torch.float64).requires_grad_()
    values = (torch.rand(rows, labels, generator=generator) < 0.4).double()
    known = torch.rand(rows, labels, generator=generator) < 0.7
    weight = torch.rand(rows, generator=generator, dtype=torch.float64)
    return logits, torch.where(known, values, 0.0), known, weight


def test_one_label_is_the_cross_entropy_bit_for_bit():
    logits, values, _, weight = random(labels=1)
    found = loss_of(["click"], logits[:, 0], batch_of(values, weight=weight))
    assert torch.equal(found, F.binary_cross_entropy_with_logits(logits[:, 0], values[:, 0], weight, reduction="sum"))


def test_masked_entries_have_neither_loss_nor_gradient():
    logits, values, known, weight = random()
    found = loss_of(["a", {"name": "b", "weight": 3.0}], logits, batch_of(values, known, weight))
    each = F.binary_cross_entropy_with_logits(logits, values, reduction="none")
    expected = (weight[:, None] * known * each * torch.tensor([1.0, 3.0])).sum()
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits)
    assert (gradient[~known] == 0).all() and (gradient[known] != 0).all()
    nothing = loss_of(["a", "b"], logits, batch_of(values, torch.zeros_like(known), weight))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing == 0 and (gradient == 0).all()


def test_a_space_is_where_another_label_is_known_to_be_1():
    logits, values, known, weight = random()
    found = loss_of(FUNNEL, logits, batch_of(values, known, weight))
    inside = known.clone()
    inside[:, 1] &= known[:, 0] & (values[:, 0] == 1)
    each = F.binary_cross_entropy_with_logits(logits, values, reduction="none")
    torch.testing.assert_close(found, (weight[:, None] * inside * each).sum())


@pytest.mark.parametrize("divisor", ["batch", "task"])
def test_the_divisor_is_that_of_all_rows_or_of_the_label(divisor):
    logits, values, known, weight = random()
    found = loss_of(["a", "b"], logits, batch_of(values, known, weight), divisor=divisor) / weight.sum()
    each = F.binary_cross_entropy_with_logits(logits, values, reduction="none")
    masked = weight[:, None] * known
    sums = (masked * each).sum(0)
    torch.testing.assert_close(found, (sums / (weight.sum() if divisor == "batch" else masked.sum(0))).sum())


def entire_space() -> Tower:
    tower = Tower()
    tower.trains_joint = True  # type: ignore[misc]
    return tower


def test_entire_space_is_the_cross_entropy_of_the_product():
    logits, values, _, weight = random()
    values[:, 1] *= values[:, 0]
    found = loss_of(FUNNEL, logits, batch_of(values, weight=weight), entire_space())
    ctr, cvr = torch.sigmoid(logits).unbind(1)
    expected = F.binary_cross_entropy(ctr, values[:, 0], weight, reduction="sum")
    expected = expected + F.binary_cross_entropy(ctr * cvr, values[:, 1], weight, reduction="sum")
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(one, logits)[0] for one in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_entire_space_where_every_click_buys_is_twice_the_loss_of_clicks():
    logits, values, _, _ = random()
    sure = torch.stack([logits[:, 0], torch.full((60,), 50.0, dtype=torch.float64)], 1)
    both = values[:, :1].expand(-1, 2)
    found = loss_of(FUNNEL, sure, batch_of(both), entire_space())
    torch.testing.assert_close(
        found, 2 * F.binary_cross_entropy_with_logits(logits[:, 0], values[:, 0], reduction="sum")
    )


def test_entire_space_is_finite_where_sigmoids_underflow():
    logits = torch.tensor([[-120.0, -120.0], [120.0, 120.0], [-120.0, 120.0]], dtype=torch.float32, requires_grad=True)
    found = loss_of(FUNNEL, logits, batch_of([[1, 1], [0, 0], [1, 0]]), entire_space())
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.isfinite() and gradient.isfinite().all() and gradient[0, 1] < 0


def test_weights_of_a_nested_tower_give_its_ordinal_loss():
    """GNOLR for three levels, against its formula over q of every level."""
    logits, _, _, _ = random(labels=3)
    level = torch.arange(60) % 4
    values = torch.stack([(level >= i).double() for i in (1, 2, 3)], 1)
    tower = Tower()
    tower.loss_weights = (3.0, 2.0, 1.0)
    labels = [*FUNNEL[:1], {"name": "cart", "where": "click"}, {"name": "buy", "where": "cart"}]
    found = loss_of(labels, logits, batch_of(values), tower)
    q = torch.sigmoid(logits).cumprod(1)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        expected -= ((level == 0) * (1 - q[:, 0]).log()).sum() + ((level >= i + 1) * q[:, i].log()).sum()
        for j in range(i):
            expected -= ((level == j + 1) * (q[:, j] - q[:, j + 1]).log()).sum()
    torch.testing.assert_close(found, expected)


def test_losses_of_rows_against_their_formulas():
    logits, values, _, _ = random(labels=1)
    z, y = logits[:, 0], values[:, 0]
    p = torch.sigmoid(z)
    right = torch.where(y == 1, p, 1 - p)
    share = torch.where(y == 1, 0.3, 0.7).double()
    smooth = 0.8 * y + 0.1
    expected = {
        ("focal", "gamma", 1.5): -((1 - right) ** 1.5 * right.log()),
        ("cross_entropy", "smoothing", 0.2): -(smooth * p.log() + (1 - smooth) * (1 - p).log()),
        ("mse", "weight", 2.0): 2 * (z - y) ** 2,
    }
    for (loss, key, value), formula in expected.items():
        found = loss_of([{"name": "a", "loss": loss, key: value}], z, batch_of(values))
        torch.testing.assert_close(found, formula.sum())
    found = loss_of([{"name": "a", "loss": "focal", "gamma": 0.0, "positive_share": 0.3}], z, batch_of(values))
    torch.testing.assert_close(found, -(share * right.log()).sum())
    far = torch.tensor([200.0, -200.0], dtype=torch.float64, requires_grad=True)
    loss_of([{"name": "a", "loss": "focal", "gamma": 0.5}], far, batch_of([[1.0], [1.0]])).backward()
    assert far.grad.isfinite().all()


def ranked(loss: str, mix: float = 0.0) -> list:
    return [{"name": "a", "loss": loss, "mix": mix}, {"name": "b", "loss": loss, "where": "a", "mix": 0.25}]


def slow_ranking(loss: str, z, y, w, group) -> torch.Tensor:
    """Row by row over all others of its group."""
    total = torch.zeros((), dtype=torch.float64)
    rows = [i for i in range(len(z)) if w[i] > 0 and group[i] != NULL_GROUP]
    for i in rows:
        same = [j for j in rows if group[j] == group[i]]
        if loss == "pairwise":
            losers = [j for j in same if y[j] == 0]
            if y[i] == 1 and losers:
                mass = sum(w[j] for j in losers)
                total = total + w[i] * sum(w[j] * F.softplus(z[j] - z[i]) for j in losers) / mass
        else:
            sign = 0.5 if y[i] == 1 else -0.5
            total = total - w[i] * torch.log_softmax(torch.stack([sign * z[j] for j in same]), 0)[same.index(i)]
    return total


@pytest.mark.parametrize("loss", ["pairwise", "jrc"])
def test_ranking_losses_against_loops_over_pairs(loss):
    logits, values, known, weight = random()
    weight[::7] = 0
    group = torch.arange(60) * 7 % 11
    group[5:9] = NULL_GROUP
    batch = batch_of(values, known, weight, group)
    found = loss_of(ranked(loss), logits, batch)
    inside = known[:, 0] & known[:, 1] & (values[:, 0] == 1)
    expected = slow_ranking(loss, logits[:, 0], values[:, 0], weight * known[:, 0], group)
    entropy = (weight * inside * F.binary_cross_entropy_with_logits(logits[:, 1], values[:, 1], reduction="none")).sum()
    ranking = slow_ranking(loss, logits[:, 1], values[:, 1], weight * inside, group)
    expected = expected + 0.25 * entropy + 0.75 * ranking
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(one, logits)[0] for one in (found, expected))
    torch.testing.assert_close(ours, theirs)


RANKS_LABELS = [*FUNNEL, {"name": "like", "loss": "pairwise"}, {"name": "share", "loss": "jrc", "mix": 0.3}]


def rows_of_all():
    """Rows of 4 labels of which the first half are positives, and the second half none."""
    logits, values, known, weight = random(labels=4, seed=2)
    values = ((torch.arange(60) < 30).double()[:, None] * torch.ones(4)) * known
    return logits, values, known, weight, torch.arange(60) % 5


def on_a_rank(process: Process, expected: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Ranks have very different positives; their losses and gradients add up to those of one rank."""
    logits, values, known, weight, group = rows_of_all()
    step = 60 // process.world_size
    rows = slice(process.rank * step, (process.rank + 1) * step)
    for divisor, (value, gradient) in expected.items():
        part = batch_of(values[rows], known[rows], weight[rows], group[rows])
        loss = TaskLoss(labels_of(RANKS_LABELS), Tower(), process.rank, divisor)
        mine = loss(logits[rows], part, float(weight.sum()))
        (pull,) = torch.autograd.grad(mine, logits)
        found = mine.detach().clone()
        torch.distributed.all_reduce(found)
        torch.distributed.all_reduce(pull)
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(pull, gradient)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_other_positives_agree_with_one_rank(world):
    logits, values, known, weight, group = rows_of_all()
    expected = {}
    for divisor in ("batch", "task"):
        value = loss_of(RANKS_LABELS, logits, batch_of(values, known, weight, group), divisor=divisor)
        expected[divisor] = (value.detach(), torch.autograd.grad(value, logits)[0])
    on_ranks(world, on_a_rank, expected)
