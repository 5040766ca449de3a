"""mix64: a bijection of the 64-bit integers that makes ids look random, and its inverse.

It is the output function of splitmix64 (variant 13 of D. Stafford's finalisers):

    x ^= x >> 30;  x *= 0xBF58476D1CE4E5B9;  x ^= x >> 27;  x *= 0x94D049BB133111EB;  x ^= x >> 31

on unsigned numbers. Different ids stay different, and the order of real ids (small, consecutive, padded to
powers of two) does not reach the result: mix64(id) mod n spreads them evenly. Zero stays zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.reference import mix as reference


def mix64(x: Tensor) -> Tensor:
    """Map int64 to int64 of the same shape, bits taken as unsigned. Raises ValueError for other dtypes."""
    _check(x)
    ops = backend.ops_for(x) or reference
    return ops.mix64(x)


def unmix64(x: Tensor) -> Tensor:
    """Return the inverse: unmix64(mix64(x)) == x. Raises ValueError for dtypes other than int64."""
    _check(x)
    ops = backend.ops_for(x) or reference
    return ops.unmix64(x)


def _check(x: Tensor) -> None:
    if x.dtype != torch.int64:
        raise ValueError(f"x: expected int64, found {x.dtype}")


@torch.library.register_fake("tessera::mix64")
def _mix64_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("tessera::unmix64")
def _unmix64_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
