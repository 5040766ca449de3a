"""Losses of a label: those of each row, and those that compare the rows of a group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.ctr.data.columns import NULL_GROUP
from tessera.ctr.data.labels import Label

RANKED = ("pairwise", "jrc")


def loss_of_rows(label: Label, logit_b: Tensor, value_b: Tensor) -> Tensor:
    """Return the loss of each row, [B], without its weight; of `pairwise` and `jrc` the cross-entropy in them.

    focal: Lin et al., arXiv 1708.02002, eq. 5, -a (1 - p)^gamma ln p with p the probability of the label found; from
    log-sigmoids, so that neither a power of 0 nor the logarithm of one occurs.
    """
    if label.loss == "mse":
        return (logit_b - value_b).square()
    if label.loss == "cross_entropy" and label.smoothing:
        value_b = value_b * (1 - label.smoothing) + label.smoothing / 2
    entropy = F.binary_cross_entropy_with_logits(logit_b, value_b, reduction="none")
    if label.loss != "focal":
        return entropy
    other = F.logsigmoid(logit_b * (1 - 2 * value_b))  # logarithm of the probability of the other label
    focal = (label.gamma * other).exp() * entropy
    if label.positive_share is None:
        return focal
    return focal * (label.positive_share * value_b + (1 - label.positive_share) * (1 - value_b))


def ranking_loss(label: Label, logit_n: Tensor, value_n: Tensor, weight_n: Tensor, group_n: Tensor) -> Tensor:
    """Return the loss of each row among the others of its group, [N], times its weight. Rows of weight 0 and those
    without a group (null) compare with none. All of a group must be here, of all ranks."""
    weight_n = torch.where(group_n == NULL_GROUP, 0.0, weight_n)
    loss = _pairwise if label.loss == "pairwise" else _jrc
    return loss(logit_n, value_n, weight_n, group_n)


def _pairwise(logit_n: Tensor, value_n: Tensor, weight_n: Tensor, group_n: Tensor) -> Tensor:
    """RankNet (Burges et al., ICML 2005), which for labels of 0 and 1 is BPR (Rendle et al., UAI 2009): for a positive
    i, the mean of ln(1 + exp(z_j - z_i)) over the negatives j of its group, by their weights; 0 without any.

    The pairs of a batch are listed, so that a group of P positives and N negatives takes P N numbers; a GPU makes the
    host wait for their count.
    """
    used = torch.nonzero(weight_n > 0).squeeze(1)
    order = used[torch.argsort(value_n[used], stable=True)]
    order = order[torch.argsort(group_n[order], stable=True)]  # by group, negatives first
    logit, weight, positive = logit_n[order], weight_n[order], value_n[order] == 1
    _, place, sizes = torch.unique_consecutive(group_n[order], return_inverse=True, return_counts=True)
    first = sizes.cumsum(0) - sizes
    negatives = torch.zeros_like(sizes).index_add_(0, place, (~positive).to(sizes.dtype))
    mass = torch.zeros_like(weight[: len(sizes)]).index_add_(0, place, weight * ~positive)
    winners = torch.nonzero(positive).squeeze(1)
    pairs_of = negatives[place[winners]]
    winner = torch.repeat_interleave(winners, pairs_of)
    begins = torch.repeat_interleave(first[place[winners]] - (pairs_of.cumsum(0) - pairs_of), pairs_of)
    loser = begins + torch.arange(len(winner), device=winner.device)
    share = weight[loser] / mass[place[winner]]
    loss = weight[winner] * share * F.softplus(logit[loser] - logit[winner])
    return torch.zeros_like(logit_n).index_add(0, order[winner], loss)


def _jrc(logit_n: Tensor, value_n: Tensor, weight_n: Tensor, group_n: Tensor) -> Tensor:
    """The ranking part of JRC (Sheng et al., arXiv 2208.06164): -ln of the softmax of f_y over the rows of the group,
    for a row of label y, with f_1 = z / 2 and f_0 = -z / 2; so sigmoid(z) is the probability, as the paper's two
    logits have it."""
    _, place = torch.unique(group_n, return_inverse=True)
    counted = weight_n > 0
    loss = torch.zeros_like(logit_n)
    for half, chosen in ((logit_n / 2, value_n == 1), (-logit_n / 2, value_n != 1)):
        total = _logsumexp(torch.where(counted, half, -torch.inf), place)
        loss = torch.where(chosen & counted, total[place] - half, loss)
    return weight_n * loss


def _logsumexp(value_n: Tensor, place_n: Tensor) -> Tensor:
    """Return ln of the sum of exp by place; 0 where a place has -inf alone."""
    top = torch.full_like(value_n, -torch.inf).scatter_reduce(0, place_n, value_n.detach(), "amax")
    top = torch.where(top.isinf(), 0.0, top)
    total = torch.zeros_like(value_n).index_add(0, place_n, (value_n - top[place_n]).exp())
    return top + torch.where(total > 0, total, 1.0).log()
