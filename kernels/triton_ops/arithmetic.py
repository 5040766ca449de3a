"""Arithmetic of the kernels: mix64, counter-based random numbers, rounding to formats, addresses of rows.

Formulas: `kernels/mix.py`, `kernels/random.py`, `kernels/quantise.py`. Format numbers are places in `formats.FORMATS`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FP32, FP16, BF16, INT8, INT4, INT2 = (tl.constexpr(number) for number in range(6))


class Cells(NamedTuple):
    """The cells of a tile in a kernel: column int32 [1, COLUMNS], known [ROWS, 1] its rows, mask [ROWS, COLUMNS]."""

    column: object
    known: object
    mask: object


class Stored(NamedTuple):
    """How values are stored, as a constant of kernels: a place in FORMATS, its bits, whether rounded to nearest."""

    format: int
    bits: int
    nearest: bool


@triton.jit
def mix64(x):
    """Apply mix64 to uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def unmix64(x):
    x = (x ^ (x >> 31) ^ (x >> 62)) * 0x319642B2D24D8EC3
    x = (x ^ (x >> 27) ^ (x >> 54)) * 0x96DE1B173F119089
    return x ^ (x >> 30) ^ (x >> 60)


@triton.jit
def hash_of(ids):
    """Map int64 ids to the uint64 hashes that stand for them in the id map."""
    return mix64(ids.to(tl.uint64, bitcast=True) + GOLDEN)


@triton.jit
def row_key(stream, ids):
    """Return the key that all random numbers of an id share; stream and ids int64."""
    return mix64(hash_of(ids) ^ stream.to(tl.int64).to(tl.uint64, bitcast=True))


@triton.jit
def random_bits(key, column):
    """Return 64 random bits; key uint64, column int32."""
    return mix64(key + (column + 1).to(tl.uint64) * GOLDEN)


@triton.jit
def uniform(key, column):
    bits = random_bits(key, column) >> 40
    return bits.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def draw(key, column):
    """Return the random draw in [0, 1) that stochastic rounding uses for a column."""
    x = key.to(tl.uint32) + (column + 1).to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = (x ^ (x >> 16)) + (key >> 32).to(tl.uint32)
    return (x >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def fraction(bits):
    """Return the upper 53 of 64 bits as float64 in [0, 1)."""
    return (bits >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def normal(key, column):
    """Return a standard normal number by Box and Muller's transform of the pair of columns that `column` is in."""
    even = column - column % 2
    radius = tl.sqrt(-2.0 * tl.log(fraction(random_bits(key, even)) + 1.1102230246251565e-16))
    angle = fraction(random_bits(key, even + 1)) * 6.283185307179586
    return (radius * tl.where(column % 2 == 0, tl.cos(angle), tl.sin(angle))).to(tl.float32)


@triton.jit
def nearest(x):
    """Round x to an integer, ties to even: the sum has no bits for a fraction. |x| < 2^22 or infinite."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_code(x, draws, NEAREST: tl.constexpr, BITS: tl.constexpr):
    """Return the code (float32) of x = value / scale."""
    high: tl.constexpr = (1 << (BITS - 1)) - 1
    low: tl.constexpr = -high - 1
    x = tl.minimum(tl.maximum(x, low - 1.0), high + 1.0)
    if NEAREST:
        rounded = nearest(x)
    else:
        below = tl.floor(x)
        rounded = below + tl.where(draws < x - below, 1.0, 0.0)
    return tl.minimum(tl.maximum(rounded, low * 1.0), high * 1.0)


@triton.jit
def to_grid(x, draws, NEAREST: tl.constexpr, FORMAT: tl.constexpr):
    """Round a float32 to a number of fp16 or bf16; return it as float32."""
    mantissa: tl.constexpr = (10 if FORMAT == FP16 else 7) << 23
    lowest: tl.constexpr = (113 if FORMAT == FP16 else 14) << 23
    most: tl.constexpr = 65504.0 if FORMAT == FP16 else 3.3895313892515355e38
    bits = x.to(tl.int32, bitcast=True)
    spacing = tl.maximum(bits & 0x7F800000, lowest) - mantissa
    y = x * ((254 << 23) - spacing).to(tl.float32, bitcast=True)
    if NEAREST:
        size = nearest(y).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        rounded = (size | ((bits >> 31) << 31)).to(tl.float32, bitcast=True)  # zero keeps the sign of x
    else:
        below = tl.floor(y)
        rounded = below + tl.where(draws < y - below, 1.0, 0.0)
    return tl.minimum(tl.maximum(rounded * spacing.to(tl.float32, bitcast=True), -most), most)


@triton.jit
def aligned(address, ALIGN: tl.constexpr, TYPE: tl.constexpr):
    """Return pointers [ROWS, 1] to addresses that are multiples of ALIGN: a hint on the address itself is lost where it
    becomes a pointer, and without one nothing is loaded in vectors."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGN > 1:
        pointer = tl.multiple_of(pointer, (ALIGN, ALIGN))
    return pointer


@triton.jit
def load_values(address, column, mask, scale, FORMAT: tl.constexpr, BITS: tl.constexpr, ALIGN: tl.constexpr = 1):
    """Load values (float32) of rows from the bytes at `address` [ROWS, 1] on, multiples of ALIGN; all arguments
    broadcast to one tile."""
    if FORMAT == FP32:
        return tl.load(aligned(address, ALIGN, tl.float32) + column, mask=mask, other=0.0)
    elif FORMAT == FP16:
        return tl.load(aligned(address, ALIGN, tl.float16) + column, mask=mask, other=0.0).to(tl.float32)
    elif FORMAT == BF16:
        upper = tl.load(aligned(address, ALIGN, tl.uint16) + column, mask=mask, other=0)
        return (upper.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == INT8:
        code = tl.load(aligned(address, ALIGN, tl.int8) + column, mask=mask, other=0)
        return scale * code.to(tl.float32)
    else:
        per_byte: tl.constexpr = 8 // BITS
        half: tl.constexpr = 1 << (BITS - 1)
        byte = tl.load((address + column // per_byte).to(tl.pointer_type(tl.uint8)), mask=mask, other=0)
        code = (byte.to(tl.int32) >> (column % per_byte * BITS)) & (2 * half - 1)
        return scale * ((code ^ half) - half).to(tl.float32)


@triton.jit
def store_values(address, cells, x, scale, key, first_draw, STORED: tl.constexpr, ALIGN: tl.constexpr = 1):
    """Write a tile x [ROWS, COLUMNS] of float32 into rows at addresses [ROWS, 1], multiples of ALIGN.

    key uint64 [ROWS, 1] and columns counted from first_draw give the random draws.
    """
    column, mask = cells.column, cells.mask
    if STORED.format == FP32:
        tl.store(aligned(address, ALIGN, tl.float32) + column, x, mask=mask)
    else:
        draws = x if STORED.nearest else draw(key, column + first_draw)
        if STORED.format == FP16:
            half = to_grid(x, draws, STORED.nearest, STORED.format).to(tl.float16)
            tl.store(aligned(address, ALIGN, tl.float16) + column, half, mask=mask)
        elif STORED.format == BF16:
            half = (to_grid(x, draws, STORED.nearest, STORED.format).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
            tl.store(aligned(address, ALIGN, tl.uint16) + column, half, mask=mask)
        else:
            code = to_code(tl.div_rn(x, scale + tl.zeros_like(x)), draws, STORED.nearest, STORED.bits).to(tl.int32)
            if STORED.format == INT8:
                tl.store(aligned(address, ALIGN, tl.int8) + column, code.to(tl.int8), mask=mask)
            else:
                store_codes(address, mask, code, STORED.bits)


@triton.jit
def store_codes(address, mask, code, BITS: tl.constexpr):
    """Put several codes into each byte; unused bits of the last byte are zero."""
    per_byte: tl.constexpr = 8 // BITS
    rows: tl.constexpr = code.shape[0]
    columns: tl.constexpr = code.shape[1]
    width: tl.constexpr = columns // per_byte
    code = tl.where(mask, code & ((1 << BITS) - 1), 0)
    place = tl.arange(0, columns)[None, :] % per_byte
    byte = tl.sum(tl.reshape(code << (place * BITS), [rows, width, per_byte]), axis=2)
    used = tl.max(tl.reshape(mask.to(tl.int32), [rows, width, per_byte]), axis=2) > 0
    at = address + tl.arange(0, width)[None, :]
    tl.store(at.to(tl.pointer_type(tl.uint8)), byte.to(tl.uint8), mask=used)


@triton.jit
def address_of(bases, rows, known, CHUNK: tl.constexpr):
    """Return addresses (int64) of rows in chunks."""
    base = tl.load(bases + (rows >> CHUNK.shift), mask=known, other=0)
    return tl.multiple_of(base, 16) + (rows & ((1 << CHUNK.shift) - 1)) * CHUNK.bytes
