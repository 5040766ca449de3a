"""Define the optimizers of rows by name, their state, and their numbers; formulas in `kernels/update.py`."""

from __future__ import annotations

from typing import NamedTuple

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")


def state_width(optimizer: str, dim: int) -> int:
    """Return the number of float32 columns of state that belong to the `dim` values of a row.

    adagrad: s [dim]; rowwise_adagrad: s [1]; adam: m [dim], v [dim], t [1]; ftrl: z [dim], n [dim].
    Raises ValueError for an unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, found {optimizer!r}")
    widths = {"sgd": 0, "adagrad": dim, "rowwise_adagrad": 1, "adam": 2 * dim + 1, "ftrl": 2 * dim}
    return widths[optimizer]


class OptimizerSettings(NamedTuple):
    """The numbers of one optimizer step. Ops take them as they are (`float[] settings`), so `csrc/optimizers.h` and
    `triton_ops/optimizers.py` read them in this order.

    Every optimizer ignores those that its formula does not have. gradient_scale is for scales alone, whose gradient
    it multiplies (`kernels/packed.py`).
    """

    learning_rate: float
    weight_decay: float = 0.0
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    gradient_scale: float = 1.0
