"""Bring what owners answer for ids to the ranks that asked, and gradients back."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.types import QuantizedCommCodecs

from tessera.distributed.id_exchange import HostRoute, Route
from tessera.kernels.autograd import apply
from tessera.kernels.pool import sum_by_row


def answer(rows: Tensor, route: Route | HostRoute, codecs: QuantizedCommCodecs | None) -> Tensor:
    """Map the rows that this rank owns, float32 [owned, dim] in the order in which ids came, to those that it asked
    for, [asked, dim] in the order of its ids. Differentiable. Collective."""
    if isinstance(route, HostRoute):
        of_host = answer(rows, route.between, codecs)
        return answer(repeated(of_host, route.index), route.inside, codecs)
    answered: Tensor = apply(_Answer, rows, route, codecs)
    return answered


def repeated(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows[index], whose gradients are summed by row in the order of `index`, with no race. rows: float32
    [u, dim]; index: int64 [n]."""
    found: Tensor = apply(_Repeated, rows, index)
    return found


class _Answer(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, codecs: QuantizedCommCodecs | None) -> Tensor:
        ctx.route, ctx.codecs, ctx.owned = route, codecs, rows.shape[0]
        sent = rows.contiguous() if codecs is None else codecs.forward.encode(rows).contiguous()
        came = sent.new_empty(route.order.numel(), sent.shape[1])  # what is padded reads its first row
        dist.all_to_all_single(came, sent, route.asked, route.owned, group=route.group)
        answered = came.index_select(0, route.places)
        return answered if codecs is None else codecs.forward.decode(answered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        route, codecs = ctx.route, ctx.codecs
        grad = grad if codecs is None else codecs.backward.encode(grad)
        sent = grad.index_select(0, route.order)
        came = sent.new_empty(ctx.owned, sent.shape[1])
        dist.all_to_all_single(came, sent, route.owned, route.asked, group=route.group)
        grads = came if codecs is None else codecs.backward.decode(came)
        # As in torchrec: gradients are averaged over ranks, like those of data parallel weights.
        return grads.div_(len(route.asked)) if get_gradient_division() else grads, None, None


class _Repeated(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.rows = index, rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_by_row(grad.contiguous(), ctx.index, ctx.rows), None
