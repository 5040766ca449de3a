"""Unsigned 64-bit arithmetic on int64 tensors: products and sums wrap alike, shifts need care."""

from __future__ import annotations

from torch import Tensor


def signed(number: int) -> int:
    """Return the Python integer whose int64 bit pattern is that of `number` modulo 2**64."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right logically by 1..63 bits: the arithmetic shift with the copies of the sign cleared."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def rotate_left(x: Tensor, bits: int) -> Tensor:
    """Rotate int64 left by 1..63 bits."""
    return (x << bits) | shift_right(x, 64 - bits)
