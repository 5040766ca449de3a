"""Attention of HSTU: SiLU instead of softmax, over the tokens of each row (Zhai et al., ICML 2024, arXiv 2402.17152).

    A_ij = SiLU(alpha q_i . k_j) / divisor * M_ij,   out_i = sum_j A_ij v_j

The divisor is a constant, so that many similar events weigh more than one. It is not a softmax: torch's flex attention
and scaled dot-product attention do not compute it. Rows are put into rectangles by their length, of the same power of
two, and rectangles are cut into pieces whose [rows, heads, L, L] fits a cache; the backward pass makes A anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE, PIECE_ON_GPU = 1 << 20, 1 << 27  # values of a head of A at a time


def hstu_mask(lengths: Tensor, prefix: int, targets: int, longest: int) -> Tensor:
    """Return which token sees which, bool [R, L, L], of rows of `prefix` contextual tokens, events in order of time,
    and `targets` candidates.

    lengths: int64 [R], tokens of each row in all. Events see what came before them, and themselves; every token sees
    the prefix, which sees itself alone; a target sees all events and itself, never another target.
    """
    at = torch.arange(longest, device=lengths.device)
    there = at < lengths.unsqueeze(1)
    is_target = (at >= lengths.unsqueeze(1) - targets) & there
    sees = at.unsqueeze(0) <= at.unsqueeze(1)
    in_prefix = at < prefix
    sees = sees | (in_prefix.unsqueeze(0) & in_prefix.unsqueeze(1))
    others = is_target.unsqueeze(2) & is_target.unsqueeze(1) & (at.unsqueeze(0) != at.unsqueeze(1))
    return sees & there.unsqueeze(1) & there.unsqueeze(2) & ~others


def buckets(lengths: Tensor, longest: int) -> Iterator[tuple[Tensor, int]]:
    """Yield rows, int64 [R], with the length of their rectangle: of the same power of two of tokens on a CPU; on
    another device, or in a graph, all rows at once, as long as they may be: the host does not know their lengths."""
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        yield torch.arange(lengths.shape[0], device=lengths.device), longest
        return
    order = torch.argsort(lengths, stable=True)
    in_order = lengths[order]
    limit = 8
    first = 0
    while first < len(order):
        last = int(torch.searchsorted(in_order, limit, right=True))
        if last > first:
            yield order[first:last], int(in_order[last - 1])
        first, limit = last, 2 * limit


class HSTUAttention:
    """The attention of a batch's tokens. offsets: int64 [B + 1] of each row's tokens, its prefix first and its targets
    last; divisor: a constant; longest: tokens of a row at most."""

    def __init__(self, offsets: Tensor, prefix: int, targets: int, longest: int, divisor: float) -> None:
        self.divisor = divisor
        self.pieces: list[tuple[Tensor, Tensor]] = []  # index [R, L] into the tokens, mask [R, L, L]
        lengths = offsets.diff()
        for rows, width in buckets(lengths, longest):
            at_once = max(1, (PIECE if offsets.device.type == "cpu" else PIECE_ON_GPU) // (width * width))
            for some in [rows] if torch.compiler.is_compiling() else rows.split(at_once):
                places = offsets[some].unsqueeze(1) + torch.arange(width, device=offsets.device)
                index = torch.minimum(places, offsets[-1] - 1)
                self.pieces.append((index, hstu_mask(lengths[some], prefix, targets, width)))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, alpha: float) -> Tensor:
        """Map q, k [T, heads, d_qk] and v [T, heads, d_v] to [T, heads, d_v]."""
        return _Attention.apply(q, k, v, self.pieces, alpha, self.divisor)


def _scores(q: Tensor, k: Tensor, alpha: float) -> Tensor:
    return torch.matmul(q, k.transpose(2, 3)).mul_(alpha)  # [R, heads, L, L]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: list[tuple[Tensor, Tensor]], alpha: float, divisor: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.pieces, ctx.alpha, ctx.divisor = pieces, alpha, divisor
        out = torch.zeros_like(v)
        for index, mask in pieces:
            q_rhld, k_rhld, v_rhld = (one[index].transpose(1, 2) for one in (q, k, v))
            weights = F.silu(_scores(q_rhld, k_rhld, alpha)).mul_(mask.unsqueeze(1) / divisor)
            _add(out, index, mask, torch.matmul(weights, v_rhld))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        of_q, of_k, of_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for index, mask in ctx.pieces:
            q_rhld, k_rhld, v_rhld, g_rhld = (one[index].transpose(1, 2) for one in (q, k, v, grad))
            scale = mask.unsqueeze(1).to(q.dtype) / ctx.divisor
            s = _scores(q_rhld, k_rhld, ctx.alpha)
            p = torch.sigmoid(s)
            _add(of_v, index, mask, torch.matmul((s * p * scale).transpose(2, 3), g_rhld))
            of_s = torch.matmul(g_rhld, v_rhld.transpose(2, 3)) * scale * (p * (1 + s * (1 - p))) * ctx.alpha
            _add(of_q, index, mask, torch.matmul(of_s, k_rhld))
            _add(of_k, index, mask, torch.matmul(of_s.transpose(2, 3), q_rhld))
        return of_q, of_k, of_v, None, None, None


def _add(into: Tensor, index: Tensor, mask: Tensor, values_rhld: Tensor) -> None:
    """Write [R, heads, L, d] to the tokens that are there; each is in one piece."""
    there = mask.diagonal(dim1=1, dim2=2)  # a token sees itself
    values = values_rhld.transpose(1, 2)
    if into.device.type == "cpu" and not torch.compiler.is_compiling():
        into[index[there]] = values[there]
    else:  # without asking how many are there: places that are not add zeros
        into.index_add_(0, index.flatten(), (values * there[..., None, None]).flatten(0, 1))
