"""Choose the precision in which rows and their gradients travel between ranks.

torchrec hands what it sends to a codec. fp16: rows as float16, gradients as bfloat16, because float16 loses gradients
of a mean over a large batch (its smallest number is 6e-8). bf16: both as bfloat16. With two or more ranks, rows that
stay where they are are rounded as well: results are the same for any such number. A single rank sends nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

TRANSPORTS = ("fp32", "fp16", "bf16")


class HalfCodec:
    """Implementation of torchrec's protocol `QuantizedCommCodec` by a cast."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def encode(self, input_tensor: Tensor, ctx: Any = None) -> Tensor:
        return input_tensor.to(self._dtype)

    def decode(self, input_grad: Tensor, ctx: Any = None) -> Tensor:
        return input_grad.to(torch.float32)

    @property
    def quantized_dtype(self) -> torch.dtype:
        return self._dtype

    def calc_quantized_size(self, input_len: int, ctx: Any = None) -> int:
        return input_len

    def create_context(self) -> None:
        return None

    def padded_size(self, input_tensor: Tensor, dim_per_rank: list[int], my_rank: int, ctx: Any) -> tuple[int, int]:
        return input_tensor.numel(), 0


def codecs(transport: str) -> dict[str, QuantizedCommCodecs] | None:
    """Return the `qcomm_codecs_registry` for torchrec's sharders; None for fp32."""
    if transport == "fp32":
        return None
    forward = HalfCodec(torch.float16 if transport == "fp16" else torch.bfloat16)
    both = QuantizedCommCodecs(forward=forward, backward=HalfCodec(torch.bfloat16))
    return {
        CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: both,
        CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name: both,  # the pooled output dist; partial sums are added in float32
    }


def bytes_of_number(transport: str) -> tuple[int, int]:
    """Return how many bytes a number takes on its way: of a row, and of a gradient."""
    registry = codecs(transport)
    if registry is None:
        return 4, 4
    one = registry[CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name]
    return one.forward.quantized_dtype.itemsize, one.backward.quantized_dtype.itemsize
