"""Packed rows in torch: bytes are taken apart, worked on as float32, and put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels.formats import DTYPES, is_int
from tessera.kernels.layout import RowLayout
from tessera.kernels.optimizers import OptimizerSettings
from tessera.kernels.reference import random
from tessera.kernels.reference.chunks import by_chunk
from tessera.kernels.reference.gather import checked
from tessera.kernels.reference.quantise import dequantised, fake_quantise, rounded, scale_gradient
from tessera.kernels.reference.update import decay, merged, step

LEAST_SHRINK = 0.5  # of a scale in one update, so that it stays above zero


class Parts:
    """The parts of packed rows uint8 [n, bytes]. scales: float32 [n]; scale_state, state: float32 [n, k]."""

    def __init__(self, block: Tensor, layout: RowLayout) -> None:
        begin, floats = layout.scale_floats, layout.moments_at // 4
        first = block[:, : layout.moments_at].contiguous().view(torch.float32).reshape(block.shape[0], floats)
        end = begin + layout.scale_state
        self.scales = first[:, 0] if is_int(layout.format) else None
        self.scale_state, self.state = first[:, begin:end], first[:, end:]
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
        scales = [] if self.scales is None else [self.scales[:, None]]
        parts = [*scales, self.scale_state, state, moments, self.codes]
        parts = [part.contiguous().view(torch.uint8).reshape(n, -1) for part in parts]
        packed = torch.cat(parts, dim=1)
        return torch.cat([packed, packed.new_zeros((n, layout.bytes - packed.shape[1]))], dim=1)


def packed_gather(chunks: Sequence[Tensor], rows: Tensor, layout: Sequence[int], inverse: Tensor | None) -> Tensor:
    where = RowLayout(*layout)
    result = torch.zeros((rows.numel(), where.dim), device=rows.device)
    for chunk, positions, local in by_chunk(chunks, rows):
        parts = Parts(chunk[local], where)
        result[positions] = dequantised(parts.codes, parts.scales, where.format, where.dim)
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
    kept: Tensor | None = None,
) -> None:
    where = RowLayout(*layout)
    grads = merged(grads, rows, inverse)
    if held is not None:
        held.zero_()
    for chunk, positions, local in by_chunk(chunks, rows):
        parts = Parts(chunk[local], where)
        w = dequantised(parts.codes, parts.scales, where.format, where.dim)
        if kept is not None:
            decay(where.optimizer, w, parts.state, kept[positions], settings)
        step(where.optimizer, w, parts.state, grads[positions], settings)
        if held is None:
            parts.codes = _codes(w, parts.scales, where, ids[positions], stream)
        else:
            held[positions] = w
        if where.moments:  # always stochastic: v changes by less than half a unit of bf16 in a step
            draws = random.draws(stream, ids[positions], where.moments, where.dim)
            parts.state[:, : where.moments] = rounded(parts.state[:, : where.moments], None, "bf16", draws).float()
        chunk[local] = parts.bytes(where)


def packed_fake_quantise(
    chunks: Sequence[Tensor], rows: Tensor, held: Tensor, layout: Sequence[int], inverse: Tensor | None
) -> Tensor:
    where = RowLayout(*layout)
    result = torch.zeros((rows.numel(), where.dim), device=rows.device)
    for chunk, positions, local in by_chunk(chunks, rows):
        scales = Parts(chunk[local], where).scales
        assert scales is not None, where
        result[positions] = fake_quantise(held[positions], scales, where.format)
    return result if inverse is None else result[checked(inverse, rows)]


def packed_learn_scales(
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
        assert parts.scales is not None, where
        g = gradient_scale * scale_gradient(w, parts.scales, grads[positions], where.format)
        scales, state = parts.scales[:, None].clone(), parts.scale_state  # the state is changed in place
        step(where.optimizer, scales, state, g[:, None], settings)
        parts.scales = torch.maximum(scales[:, 0], LEAST_SHRINK * parts.scales)
        parts.codes = _codes(w, parts.scales, where, ids[positions], stream)
        chunk[local] = parts.bytes(where)


def _codes(values: Tensor, scales: Tensor | None, layout: RowLayout, ids: Tensor, stream: int) -> Tensor:
    draws = None if layout.nearest or layout.format == "fp32" else random.draws(stream, ids, layout.dim)
    return rounded(values, scales, layout.format, draws)
