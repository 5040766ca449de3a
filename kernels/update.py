"""Apply one fused optimizer step to the rows of a batch: merge duplicates, update values and state in place.

g is the gradient of a row: the sum over its positions in the batch, in order, plus weight_decay * w. All
state starts from zero unless a row was initialised with an accumulator (`kernels/initialise.py`).

    sgd              w -= lr g
    adagrad          s += g^2;  w -= lr g / (sqrt(s) + eps)
    rowwise_adagrad  s += mean(g^2);  w -= lr g / (sqrt(s) + eps)
    adam             m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;  t += 1
                     w -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ftrl             z += g - (sqrt(n + g^2) - sqrt(n)) / lr w;  n += g^2
                     w = 0 if |z| <= l1, else -(z - sign(z) l1) / ((beta + sqrt(n)) / lr + l2)

These are torch.optim's SGD, Adagrad and Adam, fbgemm's row-wise Adagrad, and FTRL-proximal of McMahan et al.
(2013). t counts the steps of this row, so the bias correction of a rare id is that of its own few gradients.
FTRL-proximal keeps no start value: w would jump to zero at the first step. An element that has seen no
gradient (n = 0) therefore takes z = -w (beta / lr + l2) - sign(w) l1, of which w is the solution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_chunks, check_index
from tessera.kernels.reference import update as reference

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")


def state_width(optimizer: str, dim: int) -> int:
    """Number of float32 columns of state behind the `dim` values of a row.

    adagrad: s [dim]; rowwise_adagrad: s [1]; adam: m [dim], v [dim], t [1]; ftrl: z [dim], n [dim].
    Raises ValueError for an unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, found {optimizer!r}")
    widths = {"sgd": 0, "adagrad": dim, "rowwise_adagrad": 1, "adam": 2 * dim + 1, "ftrl": 2 * dim}
    return widths[optimizer]


def update(
    optimizer: str,
    chunks: Sequence[Tensor],
    rows: Tensor,
    grads: Tensor,
    inverse: Tensor | None = None,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta: float = 1.0,
    l1: float = 0.0,
    l2: float = 0.0,
) -> None:
    """Update the given rows in place; formulas above.

    chunks: float32, width dim + state_width(optimizer, dim) or more, values first; rows: int64 [u],
    distinct, -1 is skipped; grads: float32 [n, dim]; inverse: int64 [n], the row of gradient i is
    rows[inverse[i]] (None: n == u, in order). A row without any gradient gets a zero gradient, so pass only
    rows of the batch. Raises ValueError for wrong dtypes, shapes or names, IndexError for a row or inverse
    out of range.
    """
    check_index("rows", rows)
    if grads.dtype != torch.float32 or grads.dim() != 2 or grads.shape[1] < 1:
        raise ValueError(f"grads: expected float32 [n, dim], found {grads.dtype} {list(grads.shape)}")
    if inverse is not None:
        check_index("inverse", inverse)
    if grads.shape[0] != (rows if inverse is None else inverse).numel():
        expected = (rows if inverse is None else inverse).numel()
        raise ValueError(f"grads: expected {expected} rows, found {grads.shape[0]}")
    dim = grads.shape[1]
    check_chunks(chunks, dim + state_width(optimizer, dim), torch.float32)
    hyper = (learning_rate, weight_decay, eps, beta1, beta2, beta, l1, l2)
    if ops := backend.ops_for(rows):
        ops.update(chunks, rows, grads, inverse, optimizer, *hyper)
    else:
        reference.update(chunks, rows, grads, inverse, optimizer, *hyper)


@torch.library.register_fake("tessera::update")
def _update_fake(
    chunks: Sequence[Tensor],
    rows: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    optimizer: str,
    learning_rate: float,
    weight_decay: float,
    eps: float,
    beta1: float,
    beta2: float,
    beta: float,
    l1: float,
    l2: float,
) -> None:
    return None
