"""Packed rows in torch: bytes are taken apart, worked on as float32, and put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels.formats import DTYPES, is_int
from tessera.kernels.layout import RowLayout
from tessera.kernels.optimizers import OptimizerSettings
from tessera.kernels.reference.chunks import by_chunk
from tessera.kernels.reference.gather import checked
from tessera.kernels.reference.quantise import dequantised, fake_quantise, rounded, step_gradient
from tessera.kernels.reference.random import lots
from tessera.kernels.reference.update import merged, step

LEAST_SHRINK = 0.5  # of a scale in one update, so that it stays above zero


class Parts:
    """The parts of packed rows uint8 [n, bytes]. steps: float32 [n]; step_state, state: float32 [n, k]."""

    def __init__(self, block: Tensor, layout: RowLayout) -> None:
        begin, floats = layout.step_floats, layout.moments_at // 4
        first = block[:, : layout.moments_at].contiguous().view(torch.float32).reshape(block.shape[0], floats)
        end = begin + layout.step_state
        self.steps = first[:, 0] if is_int(layout.format) else None
        self.step_state, self.state = first[:, begin:end], first[:, end:]
        if layout.moments:  # m and v come before the count of steps
            moments = block[:, layout.moments_at : layout.values_at].contiguous().view(torch.bfloat16)
            self.state = torch.cat([moments.to(torch.float32), self.state], dim=1)
        self.codes = block[:, layout.values_at : layout.values_at + layout.values_bytes].contiguous()
        if not is_int(layout.format):
            self.codes = self.codes.view(DTYPES[layout.format])

    def bytes(self, layout: RowLayout) -> Tensor:
        """Return the parts as uint8 [n, bytes]."""
        n = self.codes.shape[0]
        state, moments = self.state[:, layout.moments :], self.state[:, : layout.moments].to(torch.bfloat16)
        steps = [] if self.steps is None else [self.steps[:, None]]
        parts = [*steps, self.step_state, state, moments, self.codes]
        parts = [part.contiguous().view(torch.uint8).reshape(n, -1) for part in parts]
        packed = torch.cat(parts, dim=1)
        return torch.cat([packed, packed.new_zeros((n, layout.bytes - packed.shape[1]))], dim=1)


def packed_gather(chunks: Sequence[Tensor], rows: Tensor, layout: Sequence[int], inverse: Tensor | None) -> Tensor:
    where = RowLayout(*layout)
    result = torch.zeros((rows.numel(), where.dim), device=rows.device)
    for chunk, positions, local in by_chunk(chunks, rows):
        parts = Parts(chunk[local], where)
        result[positions] = dequantised(parts.codes, parts.steps, where.format, where.dim)
    return result if inverse is None else result[checked(inverse, rows)]


def packed_update(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    held: Tensor | None,
    layout: Sequence[int],
    settings: Sequence[float],
    stream: int,
) -> None:
    where = RowLayout(*layout)
    grads = merged(grads, rows, inverse)
    if held is not None:
        held.zero_()
    for chunk, positions, local in by_chunk(chunks, rows):
        parts = Parts(chunk[local], where)
        w = dequantised(parts.codes, parts.steps, where.format, where.dim)
        step(where.optimizer, w, parts.state, grads[positions], settings)
        if held is None:
            parts.codes = _codes(w, parts.steps, where, ids[positions], stream)
        else:
            held[positions] = w
        if where.moments:  # always stochastic: v changes by less than half a unit of bf16 in a step
            draws = lots(stream, ids[positions], where.moments, where.dim)
            parts.state[:, : where.moments] = rounded(parts.state[:, : where.moments], None, "bf16", draws).float()
        chunk[local] = parts.bytes(where)


def packed_look_ahead(
    chunks: Sequence[Tensor], rows: Tensor, held: Tensor, layout: Sequence[int], inverse: Tensor | None
) -> Tensor:
    where = RowLayout(*layout)
    result = torch.zeros((rows.numel(), where.dim), device=rows.device)
    for chunk, positions, local in by_chunk(chunks, rows):
        steps = Parts(chunk[local], where).steps
        assert steps is not None, where
        result[positions] = fake_quantise(held[positions], steps, where.format)
    return result if inverse is None else result[checked(inverse, rows)]


def packed_learn_steps(
    chunks: Sequence[Tensor],
    rows: Tensor,
    ids: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    held: Tensor,
    layout: Sequence[int],
    settings: Sequence[float],
    stream: int,
) -> None:
    where, gradient_scale = RowLayout(*layout), OptimizerSettings(*settings).gradient_scale
    grads = merged(grads, rows, inverse)
    for chunk, positions, local in by_chunk(chunks, rows):
        parts, w = Parts(chunk[local], where), held[positions]
        assert parts.steps is not None, where
        g = gradient_scale * step_gradient(w, parts.steps, grads[positions], where.format)
        steps, state = parts.steps[:, None].clone(), parts.step_state  # the state is changed in place
        step(where.optimizer, steps, state, g[:, None], settings)
        parts.steps = torch.maximum(steps[:, 0], LEAST_SHRINK * parts.steps)
        parts.codes = _codes(w, parts.steps, where, ids[positions], stream)
        chunk[local] = parts.bytes(where)


def _codes(values: Tensor, steps: Tensor | None, layout: RowLayout, ids: Tensor, stream: int) -> Tensor:
    draws = None if layout.nearest or layout.format == "fp32" else lots(stream, ids, layout.dim)
    return rounded(values, steps, layout.format, draws)
