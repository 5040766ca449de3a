"""Map strings to 64-bit ids: the public hash XXH64 with seed 0, and the parsing of hexadecimal ids.

A column of n strings is given as Arrow stores it: all bytes in one buffer, and n + 1 offsets into it. Both
ops run on the calling thread and release the GIL, so the reader's threads run them side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.reference import string_hash as reference


def xxh64(data: Tensor, offsets: Tensor) -> Tensor:
    """Return XXH64 (seed 0) of n byte strings.

    data: uint8 [bytes]; offsets: int64 [n + 1], not decreasing, string i is data[offsets[i]:offsets[i +
    1]]. Returns int64 [n]: the bit pattern of the unsigned hash. The result depends on the bytes alone and
    is the same on every machine, version and backend. Raises ValueError for wrong dtypes or shapes and for
    offsets that leave `data`.
    """
    _check(data, offsets)
    ops = backend.ops_for(data) or reference
    return ops.xxh64(data, offsets)


def hex_to_int64(data: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Parse n strings of 1 to 16 hexadecimal digits (either case, no prefix, no sign, no blanks).

    data, offsets: as for `xxh64`. Returns (ids int64 [n], ok bool [n]): ids holds the bits of the unsigned
    number, and 0 where ok is False (empty, too long, or a character that is no hexadecimal digit). Raises
    ValueError as `xxh64`.
    """
    _check(data, offsets)
    ops = backend.ops_for(data) or reference
    return ops.hex_to_int64(data, offsets)


def _check(data: Tensor, offsets: Tensor) -> None:
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"data: expected uint8 [bytes], found {data.dtype} {list(data.shape)}")
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(f"offsets: expected int64 [n + 1], found {offsets.dtype} {list(offsets.shape)}")


@torch.library.register_fake("tessera::xxh64")
def _xxh64_fake(data: Tensor, offsets: Tensor) -> Tensor:
    return offsets.new_empty(offsets.shape[0] - 1)


@torch.library.register_fake("tessera::hex_to_int64")
def _hex_to_int64_fake(data: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows = offsets.shape[0] - 1
    return offsets.new_empty(rows), offsets.new_empty(rows, dtype=torch.bool)
