"""Define the optimizers of rows and of scales, and which learning rate a row gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.embedding.settings import setting
from tessera.kernels.formats import STATE_FORMATS
from tessera.kernels.host_numbers import on_device
from tessera.kernels.optimizers import OPTIMIZERS, OptimizerSettings
from tessera.kernels.pool import sum_by_row
from tessera.kernels.records import Positions

NUMBERS = OptimizerSettings(learning_rate=0.05)  # of rows, where nothing else is said


@dataclass(unsafe_hash=True)  # not frozen: OmegaConf fills it key by key; once in a table, nobody changes it
class RowOptimizer:
    """Optimizer of rows; formulas in `kernels/update.py`.

    bf16 moments are rounded stochastically. `old_rows_factor` is that of IncCTR (arXiv 2009.02147): existing embeddings
    learn more slowly than added ones.
    """

    name: str = setting(
        "rowwise_adagrad",
        "rowwise_adagrad | adagrad | sgd | adam | ftrl (static tables: the first three)",
        choices=OPTIMIZERS,
    )
    lr: float = setting(NUMBERS.learning_rate, "learning rate of the rows", above=0)
    eps: float = setting(NUMBERS.eps, "keeps the divisor of adam and adagrad above 0", at_least=0)
    beta1: float = setting(
        NUMBERS.beta1, "adam: how much of the mean gradient is kept from step to step", at_least=0, below=1
    )
    beta2: float = setting(NUMBERS.beta2, "adam: how much of the mean square is kept", at_least=0, below=1)
    weight_decay: float = setting(
        NUMBERS.weight_decay, "L2 added to the gradient of rows that a batch touches (dynamic tables)", at_least=0
    )
    decay: float = setting(
        0.0,
        "every row keeps 1 - lr * decay of its values in each step, touched or not (dynamic tables; docs/tables.md)",
        at_least=0,
    )
    decay_count_power: float = setting(
        0.0, "a row seen n times decays n^-this times as fast: rare ids more; 0: all alike", at_least=0
    )
    initial_accumulator: float = setting(
        0.0, "adagrad, rowwise_adagrad: first value of the sum of squares (dynamic tables)", at_least=0
    )
    clip_norm: float | None = setting(
        None,
        "largest norm of the gradient of one row, summed over the whole batch, all ranks; null: no clipping "
        "(dynamic tables)",
        above=0,
    )
    beta: float = setting(NUMBERS.beta, "ftrl: a larger one makes the first updates smaller", at_least=0)
    l1: float = setting(NUMBERS.l1, "ftrl: pulls weights that say little to exactly 0", at_least=0)
    l2: float = setting(NUMBERS.l2, "ftrl: pulls all weights towards 0", at_least=0)
    state_format: str = setting(
        "fp32", "fp32 | bf16: moments of adam in half the bytes (dynamic tables)", choices=STATE_FORMATS
    )
    old_rows_factor: float = setting(
        1.0, "on lr, for rows that were there when the period (a day, a warm start) began (not ftrl)", above=0
    )

    def settings(self, lr: float) -> OptimizerSettings:
        """Return the numbers of one step at a learning rate."""
        return OptimizerSettings(lr, self.weight_decay, self.eps, self.beta1, self.beta2, self.beta, self.l1, self.l2)


@dataclass(frozen=True)
class ScaleOptimizer:
    """Optimizer of the learned scales of an int format (ALPT): the row's kind of optimizer, with these numbers.

    gradient_scale multiplies the gradient of a scale, that of its L2 penalty (weight_decay / 2 times its square)
    included; the paper's is 1 / sqrt(batch size * dim * largest code).
    """

    lr: float = setting(2e-5, "of scales; their optimizer is of the same kind as that of rows", above=0)
    weight_decay: float = setting(0.0, "L2 added to the gradient of scales", at_least=0)
    gradient_scale: float = setting(1.0, "multiplies the gradient of a scale", above=0)


def by_age(
    rows: Tensor, old: Tensor | None, grads: Tensor, inverse: Tensor | None, optimizer: RowOptimizer, lr: float | None
) -> tuple[list[tuple[Tensor, float]], Tensor, Tensor | None]:
    """Split rows by learning rate; return the parts with their rates, and the gradients and inverse for them.

    All rows with one rate, `lr` or the configured one; or, with `old` (bool [u]), the old ones and the others, -1 in
    place of those of the other part. Then gradients are merged here, once for both, as they are to be clipped.
    """
    lr = optimizer.lr if lr is None else lr
    if inverse is not None and (old is not None or optimizer.clip_norm is not None):
        grads, inverse = sum_by_row(grads, inverse, rows.numel()), None
    if optimizer.clip_norm is not None:
        grads = clipped(grads, optimizer.clip_norm)
    return _of_age(rows, old, optimizer, lr), grads, inverse


def _of_age(rows: Tensor, old: Tensor | None, optimizer: RowOptimizer, lr: float) -> list[tuple[Tensor, float]]:
    if old is None:
        return [(rows, lr)]
    return [(rows.masked_fill(~old, -1), lr * optimizer.old_rows_factor), (rows.masked_fill(old, -1), lr)]


def by_rate_and_age(
    rows: Tensor,
    tables: Tensor,
    old: Tensor | None,
    grads: Tensor,
    inverse: Tensor | None,
    optimizer: RowOptimizer,
    rates: Sequence[float],
) -> tuple[list[tuple[Tensor, float]], Tensor, Tensor | None]:
    """Do `by_age` for rows of many tables, int64 [u], whose learning rates are `rates`: a part for each rate."""
    _, grads, inverse = by_age(rows, old, grads, inverse, optimizer, None)
    distinct = sorted(set(rates))
    if len(distinct) == 1:
        return _of_age(rows, old, optimizer, distinct[0]), grads, inverse
    of_rows = on_device(list(rates), rows.device, torch.float64)[tables]
    own = [(rows.masked_fill(of_rows != lr, -1), lr) for lr in distinct]
    return [part for of_rate, lr in own for part in _of_age(of_rate, old, optimizer, lr)], grads, inverse


def clipped(grads: Tensor, norm: float) -> Tensor:
    """Return gradients of rows, float32 [u, width], each of which is merged: those with a larger L2 norm scaled down to
    it. All groups of a row are one vector. The norm is summed in float64, so that no finite gradient overflows it."""
    norms = torch.linalg.vector_norm(grads, dim=1, dtype=torch.float64)
    factors: Tensor = (norm / norms.clamp(min=norm)).float()
    return grads * factors.unsqueeze(1)


def merged(grads: Tensor, positions: Positions | None, rows: int) -> Tensor:
    """Return the gradient of each row, float32 [rows, width], its positions summed in order."""
    if positions is None:
        return grads
    order, begins = positions
    places = torch.arange(rows, device=order.device)
    of_row = torch.repeat_interleave(places, begins.diff(), output_size=order.numel())  # so that no GPU is waited for
    return sum_by_row(grads[order], of_row, rows)
