"""Define the optimizers of rows and of scales, and which learning rate a row gets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tessera.kernels.optimizers import OptimizerSettings


@dataclass(frozen=True)
class RowOptimizer:
    """Optimizer of rows; formulas in `kernels/update.py`. `weight_decay` is L2 on the rows of a batch.

    `initial_accumulator` is the first value of the sum of squares (adagrad and rowwise_adagrad only). `state_format`:
    fp32, or bf16 for the moments of adam, rounded stochastically. `old_rows_factor` multiplies the learning rate of
    rows that were there when the current period began (IncCTR, arXiv 2009.02147: existing embeddings learn more slowly
    than added ones).
    """

    name: str = "rowwise_adagrad"
    lr: float = 0.01
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    initial_accumulator: float = 0.0
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    state_format: str = "fp32"
    old_rows_factor: float = 1.0

    def settings(self, lr: float) -> OptimizerSettings:
        """Return the numbers of one step at a learning rate."""
        return OptimizerSettings(lr, self.weight_decay, self.eps, self.beta1, self.beta2, self.beta, self.l1, self.l2)


@dataclass(frozen=True)
class StepOptimizer:
    """Optimizer of the learned scales of an int format (ALPT): the row's kind of optimizer, with these numbers.

    gradient_scale multiplies the gradient of a scale, that of its L2 penalty (weight_decay / 2 times its square)
    included; the paper's is 1 / sqrt(batch size * dim * largest code).
    """

    lr: float = 2e-5
    weight_decay: float = 0.0
    gradient_scale: float = 1.0


def by_age(
    rows: Tensor, old: Tensor | None, grads: Tensor, inverse: Tensor | None, optimizer: RowOptimizer, lr: float | None
) -> tuple[list[tuple[Tensor, float]], Tensor, Tensor | None]:
    """Split rows by learning rate; return the parts with their rates, and the gradients and inverse for them.

    All rows with one rate, `lr` or the configured one; or, with `old` (bool [u]), the old ones and the others, -1 in
    place of those of the other part. Then gradients are merged here, once for both.
    """
    lr = optimizer.lr if lr is None else lr
    if old is None:
        return [(rows, lr)], grads, inverse
    if inverse is not None:
        grads = grads.new_zeros((rows.numel(), grads.shape[1])).index_add_(0, inverse, grads)
    return [(rows.masked_fill(~old, -1), lr * optimizer.old_rows_factor), (rows.masked_fill(old, -1), lr)], grads, None
