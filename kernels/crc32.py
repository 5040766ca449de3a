"""The checksum of files: CRC-32 as zlib has it, several times faster where the processor multiplies without carries."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend
from kernels.reference import crc32 as reference


def crc32(data: Tensor, crc: int = 0) -> int:
    """The CRC-32 of bytes (uint8 [n]) that follow others with the CRC-32 `crc`. Raises ValueError for other tensors."""
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
        raise ValueError(f"data: expected contiguous uint8 [n], found {data.dtype} {list(data.shape)}")
    if ops := backend.ops_for(data):
        return ops.crc32(data, crc)
    return reference.crc32(data, crc)


@torch.library.register_fake("tessera::crc32")
def _crc32_fake(data: Tensor, crc: int) -> int:
    return torch.library.get_ctx().new_dynamic_size()
