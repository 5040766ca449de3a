"""Merge duplicates and apply the optimizers, in torch; formulas in `kernels/update.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels.layout import RowLayout
from tessera.kernels.reference.chunks import by_chunk
from tessera.kernels.reference.gather import checked


def update(
    chunks: Sequence[Tensor],
    rows: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    layout: Sequence[int],
    settings: Sequence[float],
) -> None:
    where = RowLayout(*layout)
    grads = merged(grads, rows, inverse)
    for chunk, positions, local in by_chunk(chunks, rows):
        block = chunk[local]
        step(where.optimizer, block[:, : where.dim], block[:, where.dim :], grads[positions], settings)
        chunk[local] = block


def merged(grads: Tensor, rows: Tensor, inverse: Tensor | None) -> Tensor:
    """Return gradients float32 [n, dim] summed by row: [u, dim]."""
    if inverse is None:
        return grads
    return grads.new_zeros((rows.numel(), grads.shape[1])).index_add_(0, checked(inverse, rows), grads)


def step(optimizer: str, w: Tensor, state: Tensor, g: Tensor, settings: Sequence[float]) -> None:
    """Apply one step to values w [n, dim] and their state, in place; settings: those of `OptimizerSettings`."""
    learning_rate, weight_decay, eps, beta1, beta2, beta, l1, l2, _ = settings
    dim = w.shape[1]
    if weight_decay != 0:
        g = g + weight_decay * w
    if optimizer == "sgd":
        w -= learning_rate * g
    elif optimizer == "adagrad":
        adagrad(w, state[:, :dim], g, learning_rate, eps)
    elif optimizer == "rowwise_adagrad":
        rowwise_adagrad(w, state[:, :1], g, learning_rate, eps)
    elif optimizer == "adam":
        adam(w, state, g, learning_rate, eps, beta1, beta2)
    else:
        assert optimizer == "ftrl", optimizer
        ftrl(w, state, g, learning_rate, beta, l1, l2)


def decay(optimizer: str, w: Tensor, state: Tensor, kept: Tensor, settings: Sequence[float]) -> None:
    """Let values w [n, dim] keep a part of themselves, float32 [n], in place. Values of FTRL follow from its z: of that
    what lies beyond l1 is kept in the same measure."""
    w *= kept[:, None]
    if optimizer == "ftrl":
        z, l1 = state[:, : w.shape[1]], settings[6]
        bound = torch.full_like(z, l1).copysign(z)
        z.copy_(torch.where(z.abs() <= l1, z, bound + kept[:, None] * (z - bound)))


def adagrad(w: Tensor, s: Tensor, g: Tensor, learning_rate: float, eps: float) -> None:
    s += g * g
    w -= learning_rate * g / (s.sqrt() + eps)


def rowwise_adagrad(w: Tensor, s: Tensor, g: Tensor, learning_rate: float, eps: float) -> None:
    s += (g * g).mean(dim=1, keepdim=True)
    w -= learning_rate / (s.sqrt() + eps) * g


def adam(w: Tensor, state: Tensor, g: Tensor, learning_rate: float, eps: float, beta1: float, beta2: float) -> None:
    dim = g.shape[1]
    m, v, t = state[:, :dim], state[:, dim : 2 * dim], state[:, 2 * dim : 2 * dim + 1]
    m += (1 - beta1) * (g - m)
    v.mul_(beta2).add_((1 - beta2) * g * g)
    t += 1
    # float64: 1 - beta2^t of the first steps would lose its digits in float32.
    steps = t.double()
    step_size = (learning_rate / (1 - torch.pow(beta1, steps))).float()
    root = torch.sqrt(1 - torch.pow(beta2, steps)).float()
    w -= step_size * m / (v.sqrt() / root + eps)


def ftrl(w: Tensor, state: Tensor, g: Tensor, learning_rate: float, beta: float, l1: float, l2: float) -> None:
    dim = g.shape[1]
    z, n = state[:, :dim], state[:, dim : 2 * dim]
    fresh = n == 0
    z.copy_(torch.where(fresh, -w * (beta / learning_rate + l2) - w.sign() * l1, z))
    grown = n + g * g
    z += g - (grown.sqrt() - n.sqrt()) / learning_rate * w
    n.copy_(grown)
    solution = -(z - z.sign() * l1) / ((beta + n.sqrt()) / learning_rate + l2)
    w.copy_(torch.where(z.abs() <= l1, torch.zeros_like(w), solution))
