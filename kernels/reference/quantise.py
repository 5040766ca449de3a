"""Round to formats of low precision, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.kernels.formats import BITS, DTYPES, FORMATS, code_range, is_int
from tessera.kernels.reference import random

# A float format is a grid whose spacing is a power of two for values of one exponent: mantissa bits, the exponent
# below which the spacing stays, and the largest value.
GRIDS = {"fp16": (10, -14, 65504.0), "bf16": (7, -113, float(torch.finfo(torch.bfloat16).max))}


def round_to_integer(x: Tensor, draws: Tensor | None) -> Tensor:
    """Round to nearest, ties to even; or, with random draws in [0, 1), up with probability the fraction of x, else
    down."""
    if draws is None:
        return x.round()
    below = x.floor()
    return below + (draws < x - below).to(x.dtype)


def to_codes(values: Tensor, scales: Tensor, format: str, draws: Tensor | None) -> Tensor:
    """Return int32 [n, dim] codes of values [n, dim] with scales [n]."""
    low, high = code_range(format)
    return round_to_integer(values / scales[:, None], draws).clamp(low, high).to(torch.int32)


def to_grid(values: Tensor, format: str, draws: Tensor | None) -> Tensor:
    """Round values [n, dim] to those that a float format holds exactly; still float32."""
    mantissa, lowest, most = GRIDS[format]
    exponent = (torch.frexp(values)[1] - 1).clamp(min=lowest)
    spacing = ((exponent - mantissa + 127) << 23).view(torch.float32)
    return (round_to_integer(values / spacing, draws) * spacing).clamp(-most, most)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack int32 [n, dim] codes to uint8 [n, ceil(dim * bits / 8)]."""
    per_byte = 8 // bits
    columns = -(-codes.shape[1] // per_byte)
    padded = codes.new_zeros((codes.shape[0], columns * per_byte))
    padded[:, : codes.shape[1]] = codes & ((1 << bits) - 1)
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * bits
    return (padded.view(-1, columns, per_byte) << shifts).sum(dim=2).to(torch.uint8)


def unpack(stored: Tensor, dim: int, bits: int) -> Tensor:
    """Unpack uint8 [n, columns] to int32 [n, dim] codes."""
    shifts = torch.arange(8 // bits, device=stored.device, dtype=torch.int32) * bits
    codes = (stored.to(torch.int32)[:, :, None] >> shifts) & ((1 << bits) - 1)
    half = 1 << (bits - 1)
    return ((codes ^ half) - half).flatten(1)[:, :dim]


def quantise(values: Tensor, scales: Tensor | None, format: int, ids: Tensor, stream: int, rounding: str) -> Tensor:
    name = FORMATS[format]
    nearest = rounding == "nearest" or name == "fp32"
    return rounded(values, scales, name, None if nearest else random.draws(stream, ids, values.shape[1]))


def dequantise(stored: Tensor, scales: Tensor | None, format: int, dim: int) -> Tensor:
    return dequantised(stored, scales, FORMATS[format], dim)


def rounded(values: Tensor, scales: Tensor | None, format: str, draws: Tensor | None) -> Tensor:
    """Return values in storage form: rounded stochastically by draws in [0, 1) of their shape, or to nearest."""
    if format == "fp32":
        return values.clone()
    if is_int(format):
        assert scales is not None, format
        return pack(to_codes(values, scales, format, draws), BITS[format])
    return to_grid(values, format, draws).to(DTYPES[format])


def dequantised(stored: Tensor, scales: Tensor | None, format: str, dim: int) -> Tensor:
    if not is_int(format):
        return stored.to(torch.float32)
    assert scales is not None, format
    return scales[:, None] * unpack(stored, dim, BITS[format]).to(torch.float32)


def fake_quantise(values: Tensor, scales: Tensor, format: str) -> Tensor:
    return scales[:, None] * to_codes(values, scales, format, None).to(torch.float32)


def scale_gradient(values: Tensor, scales: Tensor, grads: Tensor, format: str) -> Tensor:
    """Return the gradient of each row's scale, summed over its values: float32 [n]."""
    low, high = code_range(format)
    x = values / scales[:, None]
    inside = x.round() - x
    slope = torch.where(x <= low, low, torch.where(x >= high, high, inside))
    return (grads * slope).sum(dim=1)
