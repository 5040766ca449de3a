"""Prepare the next step on a second GPU stream while this step is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SideStream:
    """A CUDA stream beside the default one, in which steps run. On the CPU all work is done in the order of the code.

    Tensors allocated on this stream must outlive the steps that read them, so references are kept for two steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: deque[tuple[torch.cuda.Event, Any]] = deque()  # with events of all that was queued before the step

    @contextmanager
    def queued(self) -> Iterator[None]:
        """Queue work of this block on the side stream, which does not wait for steps that are computed."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def begin_step(self, ready: Any) -> None:
        """Let the step that is queued from here on wait for all work queued ahead, of which it uses `ready`."""
        if self._stream is None:
            return
        steps = torch.cuda.default_stream(self._stream.device)
        steps.wait_stream(self._stream)
        self._held.append((steps.record_event(), ready))
        if len(self._held) > 2:
            self._held.popleft()
            self._stream.wait_event(self._held[0][0])
