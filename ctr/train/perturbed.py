"""Sharpness-aware steps of dense weights (SAM, arXiv 2010.01412): move them along their gradient for one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tessera.embedding.helen import LEAST_NORM


@contextmanager
def perturbed(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """Inside the block, have rho g / (|g| + 1e-12) added to parameters, g being their gradients, which are then
    forgotten, and |g| the norm of all of them together; behind it they have the bits that they had."""
    moved = [one for one in parameters if one.grad is not None]
    if not moved:
        yield
        return
    with torch.no_grad():
        weights, grads = [one.detach() for one in moved], [one.grad for one in moved if one.grad is not None]
        kept = [one.clone() for one in weights]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_add_(weights, torch._foreach_mul(grads, rho / (norm + LEAST_NORM)))
    for one in moved:
        one.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)
