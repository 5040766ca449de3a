"""The optimizers of `kernels/update.py` on a tile of rows: w and g float32 [rows, columns], state at addresses.

Addresses are int64 [rows, 1], in bytes; the state of a row is float32 from `state` on. Columns outside the mask are
zero in w and g and are not written.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from tessera.kernels.triton_ops.arithmetic import BF16, Stored, aligned, load_values, store_values

# Places in OPTIMIZERS of `kernels/optimizers.py`.
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, FTRL = (tl.constexpr(number) for number in range(5))


class Numbers(NamedTuple):
    """Hyperparameters as kernels take them: float32, and pairs of float32 whose sum is nearly a float64."""

    rate: float
    rate_rest: float
    decay: float
    eps: float
    rest1: float
    beta2: float
    rest2: float
    log_beta1: float
    log_beta1_rest: float
    log_beta2: float
    log_beta2_rest: float
    beta: float
    l1: float
    l2: float
    start: float
    gradient_scale: float


def numbers(settings: Sequence[float]) -> Numbers:
    """Return the settings, those of `OptimizerSettings`, as kernels take them."""
    rate, decay, eps, beta1, beta2, beta, l1, l2, gradient_scale = (float(number) for number in settings)
    start = beta / rate + l2 if rate else math.inf
    pairs = [_pair(rate), *(_pair(math.log(b) if b > 0 else -math.inf) for b in (beta1, beta2))]
    (high, low), (high1, low1), (high2, low2) = pairs
    return Numbers(
        rate=high,
        rate_rest=low,
        decay=decay,
        eps=eps,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        log_beta1=high1,
        log_beta1_rest=low1,
        log_beta2=high2,
        log_beta2_rest=low2,
        beta=beta,
        l1=l1,
        l2=l2,
        start=start,
        gradient_scale=gradient_scale,
    )


def _pair(number: float) -> tuple[float, float]:
    if math.isinf(number):
        return number, 0.0
    high = struct.unpack("f", struct.pack("f", number))[0]
    return high, number - high


class Step(NamedTuple):
    """How rows are stepped, as a constant of kernels: a place in OPTIMIZERS, values of a row, bytes from its begin at
    which its state and its moments in bfloat16 are, if it has such, and what the address of its state is a multiple
    of."""

    optimizer: int
    dim: int
    state_at: int
    moments_at: int
    half_moments: bool
    align: int = 4


@triton.jit
def step(w, g, address, cells, draw_key, n, STEP: tl.constexpr):
    """Apply one optimizer step to rows at addresses; returns the new w. cells: `Cells`; n: `Numbers`."""
    g = tl.where(cells.mask, g + n.decay * w, 0.0)
    state = address + STEP.state_at
    if STEP.optimizer == SGD:
        return w - n.rate * g
    elif STEP.optimizer == ADAGRAD:
        return adagrad(w, g, state, cells, n, STEP.align)
    elif STEP.optimizer == ROWWISE_ADAGRAD:
        return rowwise_adagrad(w, g, state, cells.known, n, STEP.dim)
    elif STEP.optimizer == ADAM:
        if STEP.half_moments:
            return adam_half(w, g, address, cells, draw_key, n, STEP)
        return adam(w, g, state, cells, n, STEP.dim, STEP.align)
    else:
        return ftrl(w, g, state, cells, n, STEP.dim, STEP.align)


@triton.jit
def floats(address):
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def root(x):
    return tl.sqrt_rn(x)


@triton.jit
def adagrad(w, g, state, cells, n, ALIGN: tl.constexpr):
    column, mask = cells.column, cells.mask
    at = aligned(state, ALIGN, tl.float32) + column
    s = tl.load(at, mask=mask, other=0.0) + g * g
    tl.store(at, s, mask=mask)
    return w - tl.div_rn(n.rate * g, root(s) + n.eps)


@triton.jit
def rowwise_adagrad(w, g, state, known, n, DIM: tl.constexpr):
    at = floats(state)
    mean = tl.div_rn(tl.sum(g * g, axis=1, keep_dims=True), tl.zeros_like(state).to(tl.float32) + DIM)
    s = tl.load(at, mask=known, other=0.0) + mean
    tl.store(at, s, mask=known)
    return w - tl.div_rn(tl.zeros_like(s) + n.rate, root(s) + n.eps) * g


@triton.jit
def corrections(t, n):
    """Return (step size, root of 1 - beta2^t), float32, for t steps (float32 [ROWS, 1]).

    In float64: 1 - beta2^t of the first steps would lose its digits in float32.
    """
    steps = t.to(tl.float64)
    rest1 = 1.0 - tl.exp(steps * n.log_beta1 + steps * n.log_beta1_rest)
    rest2 = 1.0 - tl.exp(steps * n.log_beta2 + steps * n.log_beta2_rest)
    rate = tl.zeros_like(steps) + n.rate + n.rate_rest
    return (rate / rest1).to(tl.float32), tl.sqrt(rest2).to(tl.float32)


@triton.jit
def adam_values(w, g, m, v, t, n):
    m += n.rest1 * (g - m)
    v = v * n.beta2 + n.rest2 * g * g
    rate, bias = corrections(t, n)
    w -= tl.div_rn(rate * m, tl.div_rn(root(v), bias + tl.zeros_like(v)) + n.eps)
    return w, m, v


@triton.jit
def adam(w, g, state, cells, n, DIM: tl.constexpr, ALIGN: tl.constexpr):
    column, mask = cells.column, cells.mask
    first = aligned(state, ALIGN, tl.float32)
    at_m, at_v, at_t = first + column, first + DIM + column, first + 2 * DIM
    t = tl.load(at_t, mask=cells.known, other=0.0) + 1.0
    m, v = tl.load(at_m, mask=mask, other=0.0), tl.load(at_v, mask=mask, other=0.0)
    w, m, v = adam_values(w, g, m, v, t, n)
    tl.store(at_t, t, mask=cells.known)
    tl.store(at_m, m, mask=mask)
    tl.store(at_v, v, mask=mask)
    return w


@triton.jit
def adam_half(w, g, address, cells, key, n, STEP: tl.constexpr):
    """Moments in bfloat16, always rounded stochastically; the state is the count of steps alone."""
    steps, at_m = floats(address + STEP.state_at), address + STEP.moments_at
    at_v = at_m + 2 * STEP.dim
    t = tl.load(steps, mask=cells.known, other=0.0) + 1.0
    m = load_values(at_m, cells.column, cells.mask, 1.0, BF16, 16)
    v = load_values(at_v, cells.column, cells.mask, 1.0, BF16, 16)
    w, m, v = adam_values(w, g, m, v, t, n)
    tl.store(steps, t, mask=cells.known)
    # The values take the first `dim` random draws.
    store_values(at_m, cells, m, 1.0, key, STEP.dim, Stored(BF16, 16, nearest=False))
    store_values(at_v, cells, v, 1.0, key, 2 * STEP.dim, Stored(BF16, 16, nearest=False))
    return w


@triton.jit
def decayed_ftrl(state, kept, cells, n, ALIGN: tl.constexpr):
    """Let z keep a part of what lies beyond l1: values of FTRL follow from it."""
    at = aligned(state, ALIGN, tl.float32) + cells.column
    z = tl.load(at, mask=cells.mask, other=0.0)
    bound = tl.where(z < 0, -n.l1, n.l1)
    tl.store(at, tl.where(tl.abs(z) <= n.l1, z, bound + kept * (z - bound)), mask=cells.mask)
    tl.debug_barrier()  # the step reads it again


@triton.jit
def ftrl(w, g, state, cells, n, DIM: tl.constexpr, ALIGN: tl.constexpr):
    column, mask = cells.column, cells.mask
    first = aligned(state, ALIGN, tl.float32)
    at_z, at_n = first + column, first + DIM + column
    z, squares = tl.load(at_z, mask=mask, other=0.0), tl.load(at_n, mask=mask, other=0.0)
    sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
    z = tl.where(squares == 0, -w * n.start - sign * n.l1, z)
    grown = squares + g * g
    rate = tl.zeros_like(g) + n.rate
    z += g - tl.div_rn(root(grown) - root(squares), rate) * w
    shrunk = z - tl.where(z < 0, -n.l1, n.l1)
    solved = -tl.div_rn(shrunk, tl.div_rn(n.beta + root(grown), rate) + n.l2)
    tl.store(at_z, z, mask=mask)
    tl.store(at_n, grown, mask=mask)
    return tl.where(tl.abs(z) <= n.l1, 0.0, solved)
