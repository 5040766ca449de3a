"""Embed numeric fields. Every kind maps values [B, fields] to [B, fields, dim], except `Raw`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.embedding.errors import ConfigError


class ScaledVectors(nn.Module):
    """One learned vector per numeric field, scaled by the field's value: e_i = v_i x_i (DeepFM 2, AutoInt 4.2).

    init_std None is Xavier's for a layer of one input: sqrt(2 / (1 + dim)). l2: adds l2 v_i to the gradient in every
    step, that of l2 / 2 times the sum of squares beside the mean loss of a batch.
    """

    def __init__(self, fields: int, dim: int, init_std: float | None = 0.01, l2: float = 0.0) -> None:
        super().__init__()
        if init_std is not None and init_std < 0:
            raise ConfigError(f"numeric.init_std is {init_std}; expected null or at least 0")
        if l2 < 0:
            raise ConfigError(f"numeric.l2 is {l2}; expected at least 0")
        self.l2 = l2
        self.weight = nn.Parameter(torch.empty(fields, dim))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (1 + dim)) if init_std is None else init_std)

    def forward(self, numeric_bn: Tensor) -> Tensor:
        """Map [B, n] float32 to [B, n, dim]."""
        weight = _Decayed.apply(self.weight, self.l2) if self.l2 and self.training else self.weight
        return numeric_bn.unsqueeze(2) * weight


class _Decayed(torch.autograd.Function):
    """The weight as it is; its gradient has l2 times the weight on top, on every rank alike, of which data parallel
    takes the mean."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, l2: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.l2 = l2
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad + ctx.l2 * weight, None


class AutoDis(nn.Module):
    """A soft choice among H meta-embeddings per field (Guo et al., KDD 2021, arXiv 2012.08986, section 3):

    h = leaky_relu(w_j x),  s = W_j h + alpha h,  p = softmax(s / temperature),  e_j = sum_k p_k ME_jk
    """

    def __init__(
        self, fields: int, dim: int, buckets: int, temperature: float, skip: float, slope: float, init_std: float
    ) -> None:
        super().__init__()
        if buckets < 1:
            raise ConfigError(f"numeric.buckets is {buckets}; expected at least 1 meta-embedding per field")
        if not temperature > 0:
            raise ConfigError(f"numeric.temperature is {temperature}; expected a number above 0")
        self.temperature, self.skip, self.slope = temperature, skip, slope
        self.first = nn.Parameter(torch.empty(fields, 1, buckets))
        self.second = nn.Parameter(torch.empty(fields, buckets, buckets))
        self.meta = nn.Parameter(torch.empty(fields, buckets, dim))
        nn.init.uniform_(self.first, -1.0, 1.0)
        nn.init.normal_(self.second, std=buckets**-0.5)
        nn.init.normal_(self.meta, std=init_std)

    def forward(self, numeric_bn: Tensor) -> Tensor:
        """Map [B, n] float32 to [B, n, dim]."""
        # Fields first: each product over the batch is one matrix product per field.
        hidden_nbh = F.leaky_relu(numeric_bn.t().unsqueeze(2) * self.first, self.slope)
        scores_nbh = torch.bmm(hidden_nbh, self.second) + self.skip * hidden_nbh
        chosen_nbh = torch.softmax(scores_nbh / self.temperature, 2)
        return torch.bmm(chosen_nbh, self.meta).transpose(0, 1)


class Bucketised(nn.Module):
    """One learned vector per field and bucket: [low, high) cut into `buckets` equal parts, values outside at the ends.

    Equal parts of what the model sees, that is after the feature's transform (log1p: equal ratios of a count).
    """

    first: Tensor

    def __init__(self, fields: int, dim: int, buckets: int, low: float, high: float, init_std: float) -> None:
        super().__init__()
        if buckets < 1:
            raise ConfigError(f"numeric.buckets is {buckets}; expected at least 1")
        if not low < high:
            raise ConfigError(f"numeric.low is {low} and numeric.high {high}; expected low < high")
        self.buckets, self.low, self.high = buckets, low, high
        self.weight = nn.Parameter(torch.empty(fields * buckets, dim))
        self.register_buffer("first", torch.arange(fields) * buckets, persistent=False)
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, numeric_bn: Tensor) -> Tensor:
        """Map [B, n] float32 to [B, n, dim]."""
        place = (numeric_bn - self.low) * (self.buckets / (self.high - self.low))
        return F.embedding(place.long().clamp_(0, self.buckets - 1) + self.first, self.weight)


class Raw(nn.Module):
    """No embedding: the values themselves go to the dense layers, beside the embeddings of the id fields.

    It has no `forward`: `FieldEmbedding` and `FirstOrder` read the values instead.
    """

    def __init__(self, fields: int, dim: int) -> None:
        super().__init__()
