"""Define the layout of a row: where its values and its optimizer's state are.

A plain row is float32: the values, then the state. A packed row is one stretch of bytes (chunks are uint8
[chunk_rows, bytes]), in this order:

    scale                         float32 [1]    int formats
    state of the scale            float32 [k]    learned scales; k = state_width of the optimizer for one value
    state of the values           float32        all of it, or with bf16 moments of adam the count of steps alone
    moments m and v               bfloat16       state_format bf16
    values                        in their format (`kernels/formats.py`), padded with zeros to a multiple of 4 bytes
"""

from __future__ import annotations

from typing import NamedTuple

from tessera.kernels.formats import (
    FORMATS,
    ROUNDINGS,
    STATE_FORMATS,
    check_format,
    is_int,
    stored_columns,
    stored_dtype,
)
from tessera.kernels.optimizers import OPTIMIZERS, state_width


class RowLayout(NamedTuple):
    """The layout of a row, in integers: ops take it as it is (`int[] layout`), so the definition in torch,
    `csrc/layout.h` and the Triton kernels read this one object, in this order. Made by `packed_layout` or
    `plain_layout`.

    Attributes:
        format_number, optimizer_number: places in FORMATS and OPTIMIZERS.
        learned: 1 if the scale is learned. nearest: 1 if values are rounded to nearest, 0 if stochastically.
        scale_state, state_floats: floats of state of the scale, and of the values. moments: bfloat16 of state.
        state_at, moments_at, values_at: bytes from the begin of the row; a scale is at 0, its state at 4.
        bytes: size of a row.
    """

    format_number: int
    optimizer_number: int
    dim: int
    learned: int
    nearest: int
    scale_state: int
    state_floats: int
    moments: int
    state_at: int
    moments_at: int
    values_at: int
    bytes: int

    @property
    def format(self) -> str:
        return FORMATS[self.format_number]

    @property
    def optimizer(self) -> str:
        return OPTIMIZERS[self.optimizer_number]

    @property
    def rounding(self) -> str:
        return ROUNDINGS[self.nearest]

    @property
    def scale_floats(self) -> int:
        """1 if the row has a scale, else 0."""
        return int(is_int(self.format))

    @property
    def values_bytes(self) -> int:
        return stored_columns(self.format, self.dim) * stored_dtype(self.format).itemsize


def packed_layout(
    format: str,
    dim: int,
    optimizer: str,
    *,
    learned: bool = False,
    state_format: str = "fp32",
    rounding: str = "stochastic",
) -> RowLayout:
    """Return the layout of a packed row of `dim` values. state_format bf16 is for adam only.

    Raises ValueError for unknown names, and for optimizers that do not go with a learned scale or bf16 moments.
    """
    check_format(format)
    check_format(state_format, STATE_FORMATS, "state_format")
    check_format(rounding, ROUNDINGS, "rounding")
    if state_format == "bf16" and optimizer != "adam":
        raise ValueError(f"state_format: expected fp32 for {optimizer}, found bf16")
    if learned and not is_int(format):
        raise ValueError(f"format: expected one of int8, int4, int2 for a learned scale, found {format!r}")
    if learned and optimizer == "ftrl":
        raise ValueError("optimizer: expected one other than ftrl for a learned scale")
    scale_state = state_width(optimizer, 1) if learned else 0
    moments = 2 * dim if state_format == "bf16" else 0
    state_floats = state_width(optimizer, dim) - moments
    state_at = 4 * (is_int(format) + scale_state)
    moments_at = state_at + 4 * state_floats
    values_at = moments_at + 2 * moments
    end = values_at + stored_columns(format, dim) * stored_dtype(format).itemsize
    return RowLayout(
        format_number=FORMATS.index(format),
        optimizer_number=OPTIMIZERS.index(optimizer),
        dim=dim,
        learned=int(learned),
        nearest=ROUNDINGS.index(rounding),
        scale_state=scale_state,
        state_floats=state_floats,
        moments=moments,
        state_at=state_at,
        moments_at=moments_at,
        values_at=values_at,
        bytes=-(-end // 4) * 4,
    )


def plain_layout(dim: int, optimizer: str) -> RowLayout:
    """Return the layout of float32 [dim + state_width(optimizer, dim)]. Raises ValueError for an unknown optimizer."""
    state_floats = state_width(optimizer, dim)
    return RowLayout(
        format_number=FORMATS.index("fp32"),
        optimizer_number=OPTIMIZERS.index(optimizer),
        dim=dim,
        learned=0,
        nearest=1,
        scale_state=0,
        state_floats=state_floats,
        moments=0,
        state_at=4 * dim,
        moments_at=4 * (dim + state_floats),
        values_at=0,
        bytes=4 * (dim + state_floats),
    )
