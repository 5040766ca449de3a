"""Collectives over all ranks of a job; they return at once in a job of one rank.

All functions are collective: every rank calls them, in the same order. `group`: the ranks that take part, all of them
by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.distributed.rank import Process
from tessera.embedding.errors import TesseraError

T = TypeVar("T")


def ranks(group: dist.ProcessGroup | None = None) -> int:
    """Return how many ranks take part; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def wait_for_all(group: dist.ProcessGroup | None = None) -> None:
    """Return when all ranks have called this."""
    if ranks(group) > 1:
        dist.barrier(group)


def sum_over_ranks(*tensors: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Add the other ranks' tensors, of the same shapes, in place."""
    _reduce(dist.ReduceOp.SUM, tensors, group)


def min_over_ranks(*tensors: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Replace each number by the least that any rank has there, in place."""
    _reduce(dist.ReduceOp.MIN, tensors, group)


def _reduce(kind: dist.ReduceOp.RedOpType, tensors: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> None:
    if ranks(group) > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, kind, group)


def on_all_ranks(mine: bool) -> bool:  # noqa: FBT001 (the operand, not an option)
    """Return whether `mine` is true on all ranks."""
    answer = torch.tensor(int(mine))
    min_over_ranks(answer)
    return bool(answer)


def on_any_rank(mine: bool) -> bool:  # noqa: FBT001
    """Return whether `mine` is true on at least one rank."""
    return not on_all_ranks(not mine)


def gather(mine: Tensor) -> Tensor:
    """Return the tensors of all ranks, in their order: [ranks, n] of [n]."""
    if ranks() == 1:
        return mine.unsqueeze(0)
    everyone = mine.new_empty(ranks() * mine.numel())
    dist.all_gather_into_tensor(everyone, mine.contiguous())
    return everyone.view(ranks(), -1)


def gather_objects(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the objects of all ranks, in their order."""
    if ranks(group) == 1:
        return [mine]
    gathered: list[Any] = [None] * ranks(group)
    dist.all_gather_object(gathered, mine, group=group)
    return gathered


def from_first_rank(mine: T, group: dist.ProcessGroup | None = None) -> T:
    """Return the object of rank 0; those of other ranks are ignored."""
    values = [mine]
    if ranks(group) > 1:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def on_first_rank(process: Process, function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone, because it looks at a disk for example, and return what it returned on every
    rank. A TesseraError that it raises is raised on every rank, so that all end alike."""
    answer: tuple[Any, TesseraError | None] = (None, None)
    if process.is_main:
        try:
            answer = (function(), None)
        except TesseraError as error:
            answer = (None, error)
    found: T
    found, failed = from_first_rank(answer)
    if failed is not None:
        raise failed
    return found
