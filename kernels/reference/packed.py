"""Packed rows in torch: bytes are taken apart, worked on as float32, and put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.kernels.formats import DTYPES, PackedLayout, is_int
from tessera.kernels.reference.chunks import by_chunk
from tessera.kernels.reference.gather import checked
from tessera.kernels.reference.quantise import dequantise, fake_quantise, quantise, step_gradient
from tessera.kernels.reference.update import step

LEAST_SHRINK = 0.5  # of a scale in one update, so that it stays above zero


class Parts:
    """The parts of packed rows uint8 [n, bytes]. steps: float32 [n]; step_state, state: float32 [n, k]."""

    def __init__(self, block: Tensor, layout: PackedLayout) -> None:
        floats = layout.step_floats + layout.step_state + layout.state_floats
        first = block[:, : 4 * floats].contiguous().view(torch.float32).reshape(block.shape[0], floats)
        begin, end = layout.step_floats, layout.step_floats + layout.step_state
        self.steps = first[:, 0] if is_int(layout.format) else None
        self.step_state, self.state = first[:, begin:end], first[:, end:]
        if layout.moments:  # m and v come before the count of steps
            moments = block[:, 4 * floats : layout.codes_at].contiguous().view(torch.bfloat16)
            self.state = torch.cat([moments.to(torch.float32), self.state], dim=1)
        self.codes = block[:, layout.codes_at : layout.codes_at + layout.codes_bytes].contiguous()
        if not is_int(layout.format):
            self.codes = self.codes.view(DTYPES[layout.format])

    def bytes(self, layout: PackedLayout) -> Tensor:
        """Back to uint8 [n, bytes]."""
        n = self.codes.shape[0]
        state, moments = self.state[:, layout.moments :], self.state[:, : layout.moments].to(torch.bfloat16)
        steps = [] if self.steps is None else [self.steps[:, None]]
        parts = [*steps, self.step_state, state, moments, self.codes]
        parts = [part.contiguous().view(torch.uint8).reshape(n, -1) for part in parts]
        packed = torch.cat(parts, dim=1)
        return torch.cat([packed, packed.new_zeros((n, layout.bytes - packed.shape[1]))], dim=1)


def packed_gather(chunks: Sequence[Tensor], rows: Tensor, layout: PackedLayout, inverse: Tensor | None) -> Tensor:
    result = torch.zeros((rows.numel(), layout.dim), device=rows.device)
    for chunk, positions, local in by_chunk(chunks, rows):
        parts = Parts(chunk[local], layout)
        result[positions] = dequantise(parts.codes, parts.steps, layout.format, layout.dim)
    return result if inverse is None else result[checked(inverse, rows)]


def packed_update(
    chunks: Sequence[Tensor],
    rows: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    ids: Tensor,
    layout: PackedLayout,
    hyper: tuple[float, ...],
    stream: int,
    nearest: bool,
    held: Tensor | None,
) -> None:
    grads = merged(grads, rows, inverse)
    if held is not None:
        held.zero_()
    for chunk, positions, local in by_chunk(chunks, rows):
        parts = Parts(chunk[local], layout)
        w = dequantise(parts.codes, parts.steps, layout.format, layout.dim)
        step(layout.optimizer, w, parts.state, grads[positions], hyper)
        if held is None:
            parts.codes = quantise(w, parts.steps, layout.format, nearest, ids[positions], stream, 0)
        else:
            held[positions] = w
        if layout.moments:  # always stochastic: v changes by less than half a unit of bf16 in a step
            moments = parts.state[:, : layout.moments]
            parts.state[:, : layout.moments] = quantise(
                moments, None, "bf16", False, ids[positions], stream, layout.dim
            ).float()
        chunk[local] = parts.bytes(layout)


def packed_look_ahead(
    chunks: Sequence[Tensor], rows: Tensor, held: Tensor, layout: PackedLayout, inverse: Tensor | None
) -> Tensor:
    result = torch.zeros((rows.numel(), layout.dim), device=rows.device)
    for chunk, positions, local in by_chunk(chunks, rows):
        steps = Parts(chunk[local], layout).steps
        assert steps is not None, layout
        result[positions] = fake_quantise(held[positions], steps, layout.format)
    return result if inverse is None else result[checked(inverse, rows)]


def packed_learn_steps(
    chunks: Sequence[Tensor],
    rows: Tensor,
    held: Tensor,
    grads: Tensor,
    inverse: Tensor | None,
    ids: Tensor,
    layout: PackedLayout,
    gradient_scale: float,
    hyper: tuple[float, ...],
    stream: int,
    nearest: bool,
) -> None:
    grads = merged(grads, rows, inverse)
    for chunk, positions, local in by_chunk(chunks, rows):
        parts, w = Parts(chunk[local], layout), held[positions]
        assert parts.steps is not None, layout
        g = gradient_scale * step_gradient(w, parts.steps, grads[positions], layout.format)
        steps, state = parts.steps[:, None].clone(), parts.step_state  # the state is changed in place
        step(layout.optimizer, steps, state, g[:, None], hyper)
        parts.steps = torch.maximum(steps[:, 0], LEAST_SHRINK * parts.steps)
        parts.codes = quantise(w, parts.steps, layout.format, nearest, ids[positions], stream, 0)
        chunk[local] = parts.bytes(layout)


def merged(grads: Tensor, rows: Tensor, inverse: Tensor | None) -> Tensor:
    if inverse is None:
        return grads
    return grads.new_zeros((rows.numel(), grads.shape[1])).index_add_(0, checked(inverse, rows), grads)
