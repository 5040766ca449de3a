"""Losses of a tower's branches, beside the one of its logit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.distributed.collectives import sum_over_ranks


def worse_branches(loss: Tensor, branches: Sequence[Tensor], weight: float) -> Tensor:
    """Return L + sum_s v_s L_s with v_s = max(0, L_s - L), as this rank's part of a sum over all ranks. Collective.

    loss, branches: this rank's summed losses of the logit and of each branch; weight: that of the global batch, so that
    L and L_s are means over it. v_s has a gradient, too; that of the whole is
    (1 - sum_s [v_s > 0] L_s) dL + sum_s (v_s + [v_s > 0] L_s) dL_s, with the means as factors, which all ranks share.
    """
    own = torch.stack([loss, *branches])
    means = own.detach().clone()
    sum_over_ranks(means)
    means = means / max(weight, 1e-12)
    excess = (means[1:] - means[0]).clamp(min=0)
    counted = (excess > 0) * means[1:]
    factors = torch.cat([1 - counted.sum(0, keepdim=True), excess + counted])
    value = own[0] + (excess * own[1:]).sum()
    pulled = (factors * own).sum()
    return pulled + (value - pulled).detach()
