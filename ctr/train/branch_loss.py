"""Losses of a tower's branches, beside the one of its logit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.distributed.collectives import sum_over_ranks


def worse_branches(losses: Tensor, weights: Sequence[float], weight: float | Tensor) -> Tensor:
    """Return sum_t w_t (L_t + sum_s v_st L_st) with v_st = max(0, L_st - L_t), as this rank's part of a sum over all
    ranks. Collective.

    losses: [1 + branches, labels], this rank's summed losses of the logits to each label, then those of each branch;
    weights: of the labels; weight: that of the global batch, so that L and L_s are means over it. v_st has a gradient,
    too; that of a label's whole is (1 - sum_s [v_s > 0] L_s) dL + sum_s (v_s + [v_s > 0] L_s) dL_s, with the means as
    factors, which all ranks share.
    """
    means = losses.detach().clone()
    sum_over_ranks(means)
    means = means / (weight.clamp(min=1e-12) if isinstance(weight, Tensor) else max(weight, 1e-12))
    excess = (means[1:] - means[0]).clamp(min=0)
    counted = (excess > 0) * means[1:]
    factors = torch.cat([1 - counted.sum(0, keepdim=True), excess + counted])
    value = losses[0] + (excess * losses[1:]).sum(0)
    pulled = (factors * losses).sum(0)
    by_label = pulled + (value - pulled).detach()
    return torch.stack([one * by_label[number] for number, one in enumerate(weights)]).sum()
