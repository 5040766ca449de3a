"""Normalise over the rows of the global batch, so that a model does not depend on how they are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalises each channel by its mean and variance over all real rows of the global batch, of all ranks; then
    scale and shift. [B, channels] or [B, channels, ...]; evaluation, parameters and buffers are torch's.

    Rows that pad a rank's batch are left out. A channel with a single value in the global batch has no variance: such
    a batch is normalised by the running statistics, as in evaluation, and leaves them as they are.

    Attributes:
        real_rows: the first so many rows are real, the others pad; `Network` sets it before a step. None: all.
        alone: take this rank's rows alone, without asking the others.
        of_events: it normalises events, all of which are real.
    """

    real_rows: int | None = None
    alone = False
    of_events = False

    def forward(self, rows: Tensor) -> Tensor:
        return self._normalise(rows) if self.training else self._by_running_statistics(rows)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions from two on."""

    # The compiler cannot look into collectives; what it makes of the layers around this one is the same.
    @torch.compiler.disable
    def _normalise(self, rows: Tensor) -> Tensor:
        real = rows[: self.real_rows]
        if not self.alone and dist.is_initialized() and dist.get_world_size() > 1:
            normed = self._over_all_ranks(real)
        elif len(real) and real[:, 0].numel() > 1:
            normed = super().forward(real)
        else:
            normed = self._by_running_statistics(real)
        padding = len(rows) - len(real)
        return F.pad(normed, [0, 0] * (rows.dim() - 1) + [0, padding]) if padding else normed

    def _by_running_statistics(self, rows: Tensor) -> Tensor:
        return F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _over_all_ranks(self, rows: Tensor) -> Tensor:
        kept_mean, kept_variance, momentum = self.running_mean, self.running_var, self.momentum
        assert kept_mean is not None and kept_variance is not None and momentum is not None  # as torch's defaults are
        assert self.num_batches_tracked is not None
        values = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
        with torch.no_grad():
            count, mean, variance = _merge(*_statistics(values))
            enough = count >= 2
            share = momentum * enough
            kept_mean.lerp_(mean.to(kept_mean), share.to(kept_mean))
            unbiased = variance * (count / (count - 1).clamp(min=1))
            kept_variance.lerp_(unbiased.to(kept_variance), share.to(kept_variance))
            self.num_batches_tracked += 1
            mean = torch.where(enough, mean, kept_mean.to(mean))
            variance = torch.where(enough, variance, kept_variance.to(variance))
            # Weight of a value in the mean of gradients: 0 if the statistics do not depend on it.
            of_mean = enough / count.clamp(min=1)
        with torch.autocast(rows.device.type, enabled=False):
            normed = _Normalise.apply(values, self.weight, self.bias, mean, variance, of_mean, self.eps)
        return normed.to(rows.dtype)


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of values per channel (scalar), their mean [channels] and their variance [channels]."""
    if not len(rows):
        return rows.new_zeros(()), rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1])
    if rows.is_cuda:
        variance, mean = torch.var_mean(rows, [0, *range(2, rows.dim())], correction=0)
    else:  # six times as fast as the above
        mean, variance = torch.batch_norm_update_stats(rows, None, None, 0.0)
    return rows.new_tensor(float(rows[:, 0].numel())), mean, variance


def _merge(count: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the statistics of all ranks' rows, by the formulas of Chan et al.; the same bits on every rank."""
    mine = torch.cat([count[None], mean, variance])
    everyone = mine.new_empty(dist.get_world_size() * mine.numel())
    dist.all_gather_into_tensor(everyone, mine)
    everyone = everyone.view(-1, mine.numel())
    counts = everyone[:, :1]
    means, variances = everyone[:, 1:].chunk(2, 1)
    count = counts.sum()
    shares = counts / count.clamp(min=1)
    mean = (means * shares).sum(0)
    return count, mean, ((variances + (means - mean).square()) * shares).sum(0)


class _Normalise(torch.autograd.Function):
    """scale (x - mean) / sqrt(variance + eps) + shift, differentiated through mean and variance of the global batch."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        of_mean: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, mean, variance, of_mean)
        ctx.eps = eps
        return F.batch_norm(rows, mean, variance, weight, bias, eps=eps) if len(rows) else rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, variance, of_mean = ctx.saved_tensors
        # Gradients of a norm with given statistics; the part through the statistics is added below.
        of_rows, of_weight, of_bias = grad.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
        if len(rows):
            of_rows, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                grad, rows, weight, mean, variance, None, None, train=False, eps=ctx.eps, output_mask=[True, True, True]
            )
        sums = torch.stack([of_weight, of_bias])
        dist.all_reduce(sums)
        inverse = (variance + ctx.eps).rsqrt()
        along, level = (sums * of_mean * weight * inverse).unbind(0)
        along = along * inverse
        shape = (1, -1, *[1] * (rows.dim() - 2))
        of_rows = of_rows.addcmul_(rows, along.view(shape), value=-1).sub_((level - along * mean).view(shape))
        return of_rows, of_weight, of_bias, None, None, None, None
