"""mix64 and its inverse."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops import arithmetic
from tessera.kernels.triton_ops.launch import block, kernel, launch


@kernel
def _mix_kernel(x, out, count, INVERSE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0).to(tl.uint64, bitcast=True)
    value = arithmetic.unmix64(value) if INVERSE else arithmetic.mix64(value)
    tl.store(out + at, value.to(tl.int64, bitcast=True), mask=inside)


def mix64(x: Tensor) -> Tensor:
    return _run(x, inverse=False)


def unmix64(x: Tensor) -> Tensor:
    return _run(x, inverse=True)


def _run(x: Tensor, *, inverse: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    launch(_mix_kernel, -(-x.numel() // block()), x, out, x.numel(), INVERSE=inverse, BLOCK=block())
    return out
