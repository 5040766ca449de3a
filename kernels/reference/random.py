"""The counter-based generator in torch; formulas in `kernels/random.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tessera.kernels.reference.bits import shift_right, signed
from tessera.kernels.reference.mix import mix64, mix64_number

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: the increment of splitmix64
GOLDEN32 = 0x9E3779B9
LOW32 = (1 << 32) - 1


def stream(seed: int, table: int, step: int) -> int:
    """Return the int64 key that all rows of one table at one step share."""
    key = mix64_number(seed + GOLDEN)
    key = mix64_number(key + table + GOLDEN)
    return signed(mix64_number(key + step + GOLDEN))


def half_stream(seed: int, table: int) -> int:
    """Return what the streams of all steps of a table are made of, an int64, by `stream_at`."""
    return signed(mix64_number(mix64_number(seed + GOLDEN) + table + GOLDEN))


def stream_at(halves: Tensor, step: int) -> Tensor:
    """Return the streams of a step, int64 [n], of tables that `half_stream` gives."""
    return mix64(halves + signed(step + GOLDEN))


def row_key(stream: int | Tensor, ids: Tensor) -> Tensor:
    """Return the key that all columns of an id share: int64 [n]; stream: one for all, or int64 [n]."""
    return mix64(mix64(ids + signed(GOLDEN)) ^ stream)


def bits(stream: int, ids: Tensor, dim: int) -> Tensor:
    """Return 64 random bits for every id and column: int64 [n] to int64 [n, dim]."""
    return _bits_of(row_key(stream, ids), dim)


def _bits_of(rows: Tensor, dim: int) -> Tensor:
    column = torch.arange(1, dim + 1, device=rows.device) * signed(GOLDEN)
    return mix64(rows[:, None] + column)


def uniform(stream: int, ids: Tensor, dim: int) -> Tensor:
    return shift_right(bits(stream, ids, dim), 40).to(torch.float32) * 2.0**-24


def mix32(x: Tensor) -> Tensor:
    """Return lowbias32 of numbers below 2**32, kept in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW32
    return x ^ (x >> 16)


def draws(stream: int, ids: Tensor, dim: int, first: int = 0) -> Tensor:
    """Return columns [first, first + dim) of the random draws of stochastic rounding: float32 [n, dim] in [0, 1)."""
    return draws_of(row_key(stream, ids), dim, first)


def draws_of(rows: Tensor, dim: int, first: int = 0) -> Tensor:
    """Return what `draws` does, of the keys of rows (int64 [n])."""
    column = torch.arange(first + 1, first + dim + 1, device=rows.device) * GOLDEN32
    lot = mix32(((rows & LOW32)[:, None] + column) & LOW32) + shift_right(rows, 32)[:, None]
    return ((lot & LOW32) >> 8).to(torch.float32) * 2.0**-24


def normal(stream: int, ids: Tensor, dim: int) -> Tensor:
    return normal_of(row_key(stream, ids), dim)


def normal_of(rows: Tensor, dim: int) -> Tensor:
    """Return standard normal numbers of the keys of rows (int64 [n]): float32 [n, dim]."""
    pairs = (dim + 1) // 2
    # 53 bits fit a float64; the radius takes (0, 1], the angle [0, 1).
    fractions = shift_right(_bits_of(rows, 2 * pairs), 11).to(torch.float64) * 2.0**-53
    radius = torch.sqrt(-2.0 * torch.log(fractions[:, 0::2] + 2.0**-53))
    angle = fractions[:, 1::2] * (2.0 * math.pi)
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=2)
    return both.to(torch.float32).view(rows.numel(), 2 * pairs)[:, :dim].contiguous()
