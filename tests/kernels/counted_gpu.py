"""Count what the host does for a GPU: operations of torch, launches of Triton kernels, and waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.kernels.triton_ops import faults, launch
from tests.kernels.pretended_gpu import PretendedGpu


class Counts(NamedTuple):
    """ops: operations that torch's dispatcher carries out, views and allocations too; launches; waits of the host."""

    ops: int
    launches: int
    waits: int

    @property
    def issued(self) -> int:
        return self.ops + self.launches


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0
        self.paused = False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops += not self.paused
        return op(*args, **(kwargs or {}))


class CountedGpu(PretendedGpu):
    """A pretended GPU whose launches and operations are counted. What the interpreter does within a launch is not, nor
    that it looks for faults after each."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self._ops = _Ops()
        self._patch = mock.patch.multiple(launch, _device=self._launch)

    @contextlib.contextmanager
    def _launch(self, tensor: torch.Tensor) -> Iterator[None]:
        self.launches += 1
        self._ops.paused = True
        with torch._C.DisableTorchFunction():
            yield
        self._ops.paused = False

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[Counts]]:
        """Put what the block takes into the list."""
        before, found = (self._ops.ops, self.launches, self.waits), []
        with mock.patch.object(faults, "check", lambda device: None), self._ops:
            yield found
        found.append(Counts(self._ops.ops - before[0], self.launches - before[1], self.waits - before[2]))
