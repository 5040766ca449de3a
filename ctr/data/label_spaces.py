"""In which rows of a batch labels count, and the joint labels and probabilities of funnels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.ctr.data.labels import Label, chain_of


def known_in_space(labels: Sequence[Label], number: int, values_bt: Tensor, known_bt: Tensor | None) -> Tensor | None:
    """Return in which rows a label counts, bool [B]: it is known, and its space holds; None: in all.

    values_bt: [B, T] labels; known_bt: bool [B, T], None: all are known.
    """
    mask = None if known_bt is None or labels[number].nulls == "bad" else known_bt[:, number]
    parent = labels[number].parent
    if parent is None:
        return mask
    inside = values_bt[:, parent] == 1  # an unknown one is 0
    return inside if mask is None else mask & inside


def joint_label(
    labels: Sequence[Label], number: int, values_bt: Tensor, known_bt: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return whether all labels of the funnel up to this one are 1, float [B], and where that is known, as
    `known_in_space`: where all are, or where one of them is 0."""
    chain = chain_of(labels, number)
    values = values_bt[:, chain]
    if known_bt is None:
        return values.prod(1), None
    known = known_bt[:, chain]
    return values.prod(1), known.all(1) | (known & (values == 0)).any(1)


def joint_logit(labels: Sequence[Label], number: int, logits_bt: Tensor) -> Tensor:
    """Return the logit of the product of probabilities along the funnel up to this label, [B] of [B, T].

    With probabilities sigmoid(a) and sigmoid(z), the odds of their product are e^(a + z) / (1 + e^a + e^z): no sigmoid
    is multiplied, and nothing is clamped.
    """
    first, *more = chain_of(labels, number)
    logit = logits_bt[:, first]
    for at in more:
        step = logits_bt[:, at]
        logit = logit + step - torch.logsumexp(torch.stack([torch.zeros_like(step), logit, step]), 0)
    return logit
