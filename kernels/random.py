"""Draw random numbers that are a function of their purpose: (seed, table, id, column, step).

Nothing is drawn from a sequence, so a number does not depend on when, where, in which order or beside which
other ids it is asked for: a table's row starts from the same values on any rank of any number of ranks.

All arithmetic is on unsigned 64-bit numbers; mix is mix64 (`mix.py`) and G = 0x9E3779B97F4A7C15:

    stream           = mix(mix(mix(seed + G) + table + G) + step + G)
    row(id)          = mix(mix(id + G) ^ stream)
    bits(id, column) = mix(row(id) + (column + 1) * G)             splitmix64 started at row(id)

Stochastic rounding draws a number for every value of every row that a step writes, so these come cheaper, of
unsigned 32-bit numbers: g = 0x9E3779B9, low and high are the halves of row(id), mix32 is Wellons' lowbias32.

    lot(id, column)  = mix32(low + (column + 1) * g) + high
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.mix import mix64, unmix64
from tessera.kernels.reference import random as reference
from tessera.kernels.reference.bits import shift_right, signed


def stream(seed: int, table: int, step: int = 0) -> int:
    """Return the int64 key that all rows of one table at one step share; arguments as `uniform`."""
    return reference.stream(seed, table, step)


def half_stream(seed: int, table: int) -> int:
    """Return the int64 number that is mix(mix(seed + G) + table + G), of which the stream of any step is made."""
    return reference.half_stream(seed, table)


def uniform(seed: int, table: int, ids: Tensor, dim: int, step: int = 0) -> Tensor:
    """Return uniform numbers in [0, 1), multiples of 2**-24: the upper 24 of the 64 bits.

    seed, table (any 64-bit key of the table, for example a hash of its name), step: integers, taken modulo
    2**64; ids: int64 [n]. Returns float32 [n, dim]. Bit-identical on every backend, machine and number of
    threads; column c does not depend on dim. Raises ValueError for wrong dtypes or shapes.
    """
    _check(ids, dim)
    key = stream(seed, table, step)
    ops = backend.ops_for(ids) or reference
    return ops.uniform(key, ids, dim)


def uniform_of_tables(halves: Tensor, tables: Tensor, ids: Tensor, step: int = 0) -> Tensor:
    """Return the first number that `uniform` gives each id, of the table of each: float32 [n].

    halves: int64 [T], of each table what `half_stream` gives; tables, ids: int64 [n].
    """
    _check(ids, 1)
    streams = mix64(halves + signed(step + reference.GOLDEN))
    keys = mix64(mix64(ids + signed(reference.GOLDEN)) ^ streams[tables])
    return shift_right(mix64(keys + signed(reference.GOLDEN)), 40).to(torch.float32) * 2.0**-24


def normal(seed: int, table: int, ids: Tensor, dim: int, step: int = 0) -> Tensor:
    """Return standard normal numbers: the Box-Muller transform of columns (0, 1), (2, 3), ...; arguments as above.

    Computed in float64 and rounded to float32 [n, dim], so |x| < 8.6. Backends and machines may differ by
    one unit in the last place, because their logarithm and sine do; thread count and order change nothing.
    """
    _check(ids, dim)
    key = stream(seed, table, step)
    ops = backend.ops_for(ids) or reference
    return ops.normal(key, ids, dim)


def draws(seed: int, table: int, ids: Tensor, dim: int, step: int = 0) -> Tensor:
    """Return uniform draws in [0, 1) for stochastic rounding, multiples of 2**-24: the upper 24 of the 32 bits of
    `lot`.

    Arguments and result as `uniform`; the C++ kernels draw them where they round.
    """
    _check(ids, dim)
    return reference.draws(stream(seed, table, step), ids, dim)


def row_keys(seed: int, table: int, ids: Tensor, step: int = 0) -> Tensor:
    """Return row(id) of the formulas above, int64 [n]: the key of all numbers of an id, itself fit to be an id."""
    _check(ids, 1)
    return reference.row_key(stream(seed, table, step), ids)


def stream_at(halves: Tensor, step: int) -> Tensor:
    """Return the streams of a step, of the same shape as what `half_stream` gave: int64."""
    return reference.stream_at(halves, step)


def ids_of_stream(ids: Tensor, streams: Tensor, stream: Tensor) -> Tensor:
    """Return ids whose random numbers in one stream are those of `ids` in their own: int64 [n].

    ids, streams: int64 [n]; stream: int64 []. So rows of many tables can be rounded at random by one call.
    """
    golden = signed(reference.GOLDEN)
    return unmix64(mix64(ids + golden) ^ streams ^ stream) - golden


def _check(ids: Tensor, dim: int) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids: expected int64 [n], found {ids.dtype} {list(ids.shape)}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, found {dim}")


@torch.library.register_fake("tessera::uniform")
def _uniform_fake(stream: int, ids: Tensor, dim: int) -> Tensor:
    return ids.new_empty((ids.shape[0], dim), dtype=torch.float32)


@torch.library.register_fake("tessera::normal")
def _normal_fake(stream: int, ids: Tensor, dim: int) -> Tensor:
    return ids.new_empty((ids.shape[0], dim), dtype=torch.float32)
