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
from functools import cache

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_chunks, check_index
from tessera.kernels.layout import RowLayout, plain_layout
from tessera.kernels.optimizers import OptimizerSettings
from tessera.kernels.reference import update as reference


@cache
def _layout(optimizer: str, dim: int) -> RowLayout:
    return plain_layout(dim, optimizer)


def update(
    optimizer: str,
    chunks: Sequence[Tensor],
    rows: Tensor,
    grads: Tensor,
    inverse: Tensor | None = None,
    *,
    settings: OptimizerSettings,
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
    layout = _layout(optimizer, grads.shape[1])
    check_chunks(chunks, layout.bytes // 4, torch.float32)
    ops = backend.ops_for(rows) or reference
    ops.update(chunks, rows, grads, inverse, layout, settings)
