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
from typing import NamedTuple

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
    do_not_specialize=[
        *("bags", "begin", "bits", "count", "header", "keys", "kinds", "limit", "mark", "moment", "pieces"),
        *("positions", "ranks", "room", "segments", "stream", "tables", "told", "total", "turns", "words"),
    ]
)

#: Instead of a launch, call this with (kernel, arguments, constants): for a test that compiles without a GPU.
recorder: Callable[[object, tuple[object, ...], dict[str, object]], None] | None = None


def parts_of(device: torch.device, *sizes: int) -> tuple[Tensor, ...]:
    """Return int64 tensors of these sizes, not filled: parts of one allocation, each aligned to 16 bytes."""
    padded = [part for size in sizes for part in (size, size % 2)]
    return torch.empty(sum(padded), dtype=torch.int64, device=device).split(padded)[::2]


class Tile(NamedTuple):
    """What one program of a kernel works on, as a constant of it: rows of `dim` values, held in powers of two."""

    dim: int
    rows: int
    columns: int


def tile(dim: int, least: int = 1) -> Tile:
    """Return a tile for rows of `dim` values; its columns are at least `least`."""
    columns = max(least, triton.next_power_of_2(dim))
    return Tile(dim, max(1, _SPREAD // columns), columns)


def block() -> int:
    """Return the number of elements that one program of an elementwise kernel handles."""
    return 1 << 14 if INTERPRETED else 256


def warps_of(tile: Tile) -> int:
    """Return the number of warps of a program that works on a tile.

    A program that changes rows in place has one warp: a value that belongs to a whole row is held by every warp, and
    one warp could write it before another has read it.
    """
    return max(1, min(8, tile.rows * tile.columns // 128))


def launch(function, programs: int, *arguments: object, warps: int = 4, **constants: object) -> None:
    """Start `programs` programs of a kernel. They run where its tensors are.

    Pointers and floats that travel together come as a named tuple, and so do constants. No field is called `values`,
    `type` or `index`, which Triton's own tuples have. Integers come alone: Triton
    would compile anew for a 1 in a tuple, whatever `kernel` says.
    """
    if programs == 0:
        return
    if recorder is not None:
        recorder(function, arguments, constants | {"num_warps": warps})
        return
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    assert isinstance(first, Tensor), first
    with _device(first):
        function[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    if INTERPRETED or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
