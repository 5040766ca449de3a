"""mix64 and its inverse in torch, and mix64 of one Python number."""

from __future__ import annotations

from torch import Tensor

from tessera.kernels.reference.bits import shift_right, signed

FACTOR1 = 0xBF58476D1CE4E5B9
FACTOR2 = 0x94D049BB133111EB
# Multiplication by an odd number modulo 2**64 is undone by its inverse.
INVERSE1 = pow(FACTOR1, -1, 1 << 64)
INVERSE2 = pow(FACTOR2, -1, 1 << 64)


def mix64(x: Tensor) -> Tensor:
    x = (x ^ shift_right(x, 30)) * signed(FACTOR1)
    x = (x ^ shift_right(x, 27)) * signed(FACTOR2)
    return x ^ shift_right(x, 31)


def unmix64(x: Tensor) -> Tensor:
    # x ^ (x >> s) is undone by xoring all shifts by multiples of s that stay below 64 bits.
    x = (x ^ shift_right(x, 31) ^ shift_right(x, 62)) * signed(INVERSE2)
    x = (x ^ shift_right(x, 27) ^ shift_right(x, 54)) * signed(INVERSE1)
    return x ^ shift_right(x, 30) ^ shift_right(x, 60)


def mix64_number(x: int) -> int:
    """Return mix64 of one number, 0 <= result < 2**64."""
    x &= (1 << 64) - 1
    x = (x ^ (x >> 30)) * FACTOR1 & (1 << 64) - 1
    x = (x ^ (x >> 27)) * FACTOR2 & (1 << 64) - 1
    return x ^ (x >> 31)
