"""Round values to a format of low precision, and back (`kernels/formats.py`).

x is value / scale for int formats, value / spacing for float formats, where the spacing is that of the format's
numbers near the value (bf16: 2^-120 for values below 2^-113). The stored number is

    nearest      x rounded to an integer, ties to even
    stochastic   floor(x) + 1 with chance x - floor(x), else floor(x): the expectation is x

and then the nearest that the format has: a value out of range takes the end of the range. The lot of the stochastic
rounding is `draws` of `kernels/random.py` for (seed, table, id, column, step): it does not depend on ranks, threads
or the order of a batch. Values must not be NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import check_index
from tessera.kernels.formats import FORMATS, ROUNDINGS, check_format, is_int, stored_columns, stored_dtype
from tessera.kernels.reference import quantise as reference


def quantise(
    values: Tensor,
    scales: Tensor | None,
    format: str,
    *,
    rounding: str = "stochastic",
    ids: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Return values float32 [n, dim] in storage form: [n, stored_columns(format, dim)] of stored_dtype(format).

    scales: float32 [n], above 0, for int formats; ids: int64 [n], needed by stochastic rounding, as is `stream` of
    `kernels/random.py` for seed, table and step. Raises ValueError for unknown names, wrong dtypes or shapes.
    """
    check_format(format)
    check_format(rounding, ROUNDINGS, "rounding")
    if values.dtype != torch.float32 or values.dim() != 2 or values.shape[1] < 1:
        raise ValueError(f"values: expected float32 [n, dim], found {values.dtype} {list(values.shape)}")
    _check_scales(scales, values.shape[0], format)
    if ids is None:
        if rounding == "stochastic" and format != "fp32":
            raise ValueError("ids: expected int64 [n] for stochastic rounding, found None")
        ids = torch.empty(0, dtype=torch.int64, device=values.device)
    elif ids.numel() != values.shape[0]:
        raise ValueError(f"ids: expected {values.shape[0]} as there are rows, found {ids.numel()}")
    check_index("ids", ids)
    ops = backend.ops_for(values) or reference
    return ops.quantise(values, scales, FORMATS.index(format), ids, stream, rounding)


def dequantise(stored: Tensor, scales: Tensor | None, format: str, dim: int) -> Tensor:
    """Return the float32 [n, dim] that `quantise` made `stored` of, but for its rounding. Raises as `quantise`."""
    check_format(format)
    wanted = (stored.shape[0], stored_columns(format, dim))
    if stored.dtype != stored_dtype(format) or stored.shape != wanted:
        expected = f"{stored_dtype(format)} [n, {wanted[1]}] for {dim} values of {format}"
        raise ValueError(f"stored: expected {expected}, found {stored.dtype} {list(stored.shape)}")
    _check_scales(scales, stored.shape[0], format)
    ops = backend.ops_for(stored) or reference
    return ops.dequantise(stored, scales, FORMATS.index(format), dim)


def _check_scales(scales: Tensor | None, count: int, format: str) -> None:
    if scales is None:
        if is_int(format):
            raise ValueError(f"scales: expected float32 [n] for {format}, found None")
    elif scales.dtype != torch.float32 or scales.shape != (count,):
        raise ValueError(f"scales: expected float32 [{count}], found {scales.dtype} {list(scales.shape)}")


@torch.library.register_fake("tessera::quantise")
def _quantise_fake(
    values: Tensor, scales: Tensor | None, format: int, ids: Tensor, stream: int, rounding: str
) -> Tensor:
    name = FORMATS[format]
    columns = stored_columns(name, values.shape[1])
    return values.new_empty((values.shape[0], columns), dtype=stored_dtype(name))


@torch.library.register_fake("tessera::dequantise")
def _dequantise_fake(stored: Tensor, scales: Tensor | None, format: int, dim: int) -> Tensor:
    return stored.new_empty((stored.shape[0], dim), dtype=torch.float32)
