"""Start Triton kernels: on the GPU of their tensors, or on the CPU under Triton's interpreter.

What all kernels of this folder keep to, so that results are those of the C++ ones:

- no fused multiply-add (`enable_fp_fusion=False`), division and square root rounded to nearest (`div_rn`, `sqrt_rn`);
- arithmetic on addresses and row numbers in int64; random bits in unsigned integers;
- no atomic addition of floats: what is summed is summed in an order that the batch alone decides;
- a row or position out of range is not read or written, and noted in `faults.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import triton
from torch import Tensor

#: Kernels run on the CPU, one program after the other, in numpy: slow, for tests. Decided by TRITON_INTERPRET=1 when
#: this is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret

_SPREAD = 1 << 13 if INTERPRETED else 256  # elements of a tile; the interpreter pays by the operation, not the element

#: Declares a kernel that is launched. Its sizes change with every batch: Triton would compile again for each kind of
#: number (1, a multiple of 16, another).
kernel = triton.jit(
    do_not_specialize=["bags", "begin", "bits", "count", "limit", "pieces", "positions", "stream", "total"]
)

#: Instead of a launch, call this with (kernel, arguments, constants): for a test that compiles without a GPU.
recorder: Callable[[object, tuple[object, ...], dict[str, object]], None] | None = None


def tile(dim: int, least: int = 1) -> tuple[int, int]:
    """Return (rows, columns) of a tile for rows of `dim` values: powers of two, columns at least dim and `least`."""
    columns = max(least, triton.next_power_of_2(dim))
    return max(1, _SPREAD // columns), columns


def block() -> int:
    """Return the number of elements that one program of an elementwise kernel handles."""
    return 1 << 14 if INTERPRETED else 256


def warps_of(elements: int) -> int:
    """Return the number of warps of a program that works on a tile of so many elements.

    A program that changes rows in place has one warp: a value that belongs to a whole row is held by every warp, and
    one warp could write it before another has read it.
    """
    return max(1, min(8, elements // 128))


def launch(function, programs: int, *arguments: object, warps: int = 4, **constants: object) -> None:
    """Start `programs` programs of a kernel. The first argument is a tensor: its device is where they run."""
    if programs == 0:
        return
    if recorder is not None:
        recorder(function, arguments, constants | {"num_warps": warps})
        return
    first = arguments[0]
    assert isinstance(first, Tensor), first
    with _device(first):
        function[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    if INTERPRETED or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
