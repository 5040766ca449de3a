"""Define how values of low precision are stored. `kernels/layout.py` says where they are in a row.

    format  stored as                                range of codes       value of a code
    fp32    float32
    fp16    float16, at most 65504
    bf16    bfloat16
    int8    1 byte, two's complement                 -128 to 127          scale * code
    int4    2 codes a byte, the first in bits 0-3    -8 to 7              scale * code
    int2    4 codes a byte, the first in bits 0-1    -2 to 1              scale * code

Codes of int4 and int2 are two's complement numbers of 4 and 2 bits; unused bits of a row's last byte are zero. Every
row of an int format has a scale of its own, float32 and above 0.
"""

from __future__ import annotations

import torch

FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "int2")
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDINGS = ("stochastic", "nearest")
STATE_FORMATS = ("fp32", "bf16")


def is_int(format: str) -> bool:
    """Return True if values are codes with a scale."""
    return format.startswith("int")


def code_range(format: str) -> tuple[int, int]:
    """Return the smallest and the largest code of an int format."""
    half = 1 << (BITS[format] - 1)
    return -half, half - 1


def stored_dtype(format: str) -> torch.dtype:
    """Return the dtype of a row's values in storage form: uint8 for int formats."""
    return DTYPES.get(format, torch.uint8)


def stored_columns(format: str, dim: int) -> int:
    """Return the number of elements of `stored_dtype` that hold `dim` values."""
    return -(-dim * BITS[format] // 8) if is_int(format) else dim


def check_format(name: str, known: tuple[str, ...] = FORMATS, what: str = "format") -> None:
    """Raise ValueError unless `name` is known."""
    if name not in known:
        raise ValueError(f"{what}: expected one of {', '.join(known)}, found {name!r}")
