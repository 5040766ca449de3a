"""How rows of low precision are stored: formats of values, and the bytes of a packed row.

    format  stored as                                range of codes       value of a code
    fp32    float32
    fp16    float16, at most 65504
    bf16    bfloat16
    int8    1 byte, two's complement                 -128 to 127          step * code
    int4    2 codes a byte, the first in bits 0-3    -8 to 7              step * code
    int2    4 codes a byte, the first in bits 0-1    -2 to 1              step * code

Codes of int4 and int2 are two's complement numbers of 4 and 2 bits; unused bits of a row's last byte are zero. Every
row of an int format has a step size of its own, float32 and above 0.

A packed row is one stretch of bytes (chunks are uint8 [chunk_rows, bytes]), in this order:

    step size                     float32 [1]    int formats
    state of the step size        float32 [k]    learned step sizes; k = state_width of the optimizer for one value
    state of the values           float32        all of it, or with bf16 moments of adam the count of steps alone
    moments m and v               bfloat16       state_format bf16
    values                        as above, padded with zeros to a multiple of 4 bytes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tessera.kernels.update import state_width

FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "int2")
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDINGS = ("stochastic", "nearest")
STATE_FORMATS = ("fp32", "bf16")


def is_int(format: str) -> bool:
    """True if values are codes with a step size."""
    return format.startswith("int")


def code_range(format: str) -> tuple[int, int]:
    """Smallest and largest code of an int format."""
    half = 1 << (BITS[format] - 1)
    return -half, half - 1


def stored_dtype(format: str) -> torch.dtype:
    """dtype of a row's values in storage form: uint8 for int formats."""
    return DTYPES.get(format, torch.uint8)


def stored_columns(format: str, dim: int) -> int:
    """Elements of `stored_dtype` that hold `dim` values."""
    return -(-dim * BITS[format] // 8) if is_int(format) else dim


def check_format(name: str, known: tuple[str, ...] = FORMATS, what: str = "format") -> None:
    """Raise ValueError unless `name` is known."""
    if name not in known:
        raise ValueError(f"{what}: expected one of {', '.join(known)}, found {name!r}")


@dataclass(frozen=True)
class PackedLayout:
    """Where things are in a packed row of `dim` values. state_format bf16 is for adam only."""

    format: str
    dim: int
    optimizer: str
    learned: bool = False
    state_format: str = "fp32"

    def __post_init__(self) -> None:
        check_format(self.format)
        check_format(self.state_format, STATE_FORMATS, "state_format")
        if self.state_format == "bf16" and self.optimizer != "adam":
            raise ValueError(f"state_format: expected fp32 for {self.optimizer}, found bf16")
        if self.learned and not is_int(self.format):
            raise ValueError(f"format: expected one of int8, int4, int2 for a learned step size, found {self.format!r}")
        if self.learned and self.optimizer == "ftrl":
            raise ValueError("optimizer: expected one other than ftrl for a learned step size")

    @property
    def step_floats(self) -> int:
        return int(is_int(self.format))

    @property
    def step_state(self) -> int:
        """Floats of state of a learned step size."""
        if not self.learned:
            return 0
        return state_width(self.optimizer, 1)

    @property
    def moments(self) -> int:
        """Elements of state that are bfloat16."""
        return 2 * self.dim if self.state_format == "bf16" else 0

    @property
    def state_floats(self) -> int:
        """Elements of state that are float32."""
        return state_width(self.optimizer, self.dim) - self.moments

    @property
    def codes_at(self) -> int:
        """Byte at which the values begin."""
        return 4 * (self.step_floats + self.step_state + self.state_floats) + 2 * self.moments

    @property
    def codes_bytes(self) -> int:
        return stored_columns(self.format, self.dim) * stored_dtype(self.format).itemsize

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return -(-(self.codes_at + self.codes_bytes) // 4) * 4

    @property
    def numbers(self) -> list[int]:
        """What the compiled ops are told: format, dim, step_state, state_floats, moments, bytes."""
        format = FORMATS.index(self.format)
        return [format, self.dim, self.step_state, self.state_floats, self.moments, self.bytes]
