"""Send a few numbers of the host to the device of a step, and some of the device to the host; neither waits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(
    numbers: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Return numbers as int64 or float64 [n] on a device.

    `torch.tensor(numbers, device=...)` copies from memory that may be swapped out, and so the host waits until the GPU
    has done all that it was given before. A copy from pinned memory waits in the GPU's queue instead.
    """
    assert dtype in (torch.int64, torch.float64), dtype
    if not numbers:
        return torch.empty(0, dtype=dtype, device=device)
    # A list of hundreds of numbers takes torch.tensor several times as long.
    host = torch.frombuffer(array("q" if dtype == torch.int64 else "d", numbers), dtype=dtype)
    if device.type == "cpu":
        return host
    if torch.cuda.is_available():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class HostCopy:
    """Numbers of a GPU that are copied to the host behind what their stream has been given so far."""

    def __init__(self, numbers: Tensor) -> None:
        self._host = numbers.to("cpu", non_blocking=True)  # to pinned memory
        on_gpu = numbers.device.type == "cuda" and torch.cuda.is_available()
        self._copied = torch.cuda.current_stream(numbers.device).record_event() if on_gpu else None

    def read(self) -> Tensor:
        """Return them. The host waits until they have come, but for nothing that was queued after them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
