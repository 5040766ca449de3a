"""What only the first rank looks at, a disk for example, and all ranks must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from tessera.distributed.process import Process
from tessera.embedding.errors import TesseraError

T = TypeVar("T")


def on_first_rank(process: Process, function: Callable[[], T]) -> T:
    """What rank 0 finds out, on every rank; its TesseraError too, so that all ranks end alike."""
    answer: list = [None, None]
    if process.is_main:
        try:
            answer = [function(), None]
        except TesseraError as error:
            answer = [None, error]
    if process.world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
