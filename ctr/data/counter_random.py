"""Random numbers that are a function of (key, counter) alone: no state, no order, the same for any cut of the
work.

The function is SplitMix64: a counter times an odd constant, then a bijection of 64-bit words that passes the
usual test batteries. Only integer operations are used, so the bits are the same on every machine and numpy
version.
"""

from __future__ import annotations

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
# The multipliers' inverses modulo 2^64.
INVERSES = (np.uint64(0x96DE1B173F119089), np.uint64(0x319642B2D24D8EC3))


def mix64(x: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's bijection in place; x: uint64. Returns x."""
    shifted = x >> SHIFTS[0]
    x ^= shifted
    x *= MULTIPLIERS[0]
    np.right_shift(x, SHIFTS[1], out=shifted)
    x ^= shifted
    x *= MULTIPLIERS[1]
    np.right_shift(x, SHIFTS[2], out=shifted)
    x ^= shifted
    return x


def unmix64(x: np.ndarray) -> np.ndarray:
    """Return the inverse of `mix64`; x: uint64, not changed."""
    x = x ^ (x >> SHIFTS[2]) ^ (x >> (SHIFTS[2] * np.uint64(2)))
    x = x * INVERSES[1]
    x = x ^ (x >> SHIFTS[1]) ^ (x >> (SHIFTS[1] * np.uint64(2)))
    x = x * INVERSES[0]
    return x ^ (x >> SHIFTS[0]) ^ (x >> (SHIFTS[0] * np.uint64(2)))


def key(*words: int) -> np.uint64:
    """Return one 64-bit key made from any number of integers, in this order."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix64(state + np.array([word & 0xFFFFFFFFFFFFFFFF], np.uint64) * GAMMA + GAMMA)
    return state[0]


def bits(stream: np.uint64, counters: np.ndarray) -> np.ndarray:
    """Return 64 random bits for each counter (uint64) of a stream, as a new uint64 array."""
    x = counters * GAMMA
    x += stream
    return mix64(x)


def uniform(random_bits: np.ndarray) -> np.ndarray:
    """Return uniform float64 in [0, 1) from the upper 53 bits; the lower 11 bits remain unused."""
    x = (random_bits >> np.uint64(11)).astype(np.float64)
    x *= 2.0**-53
    return x
