"""What a batch is to the step that it belongs to, where a step has several (`trainer.accumulate`)."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """keeps: more batches of the step follow, so gradients of rows are kept and no row is updated; factor: multiplies
    the gradients of all batches of the step when the last one has come, before anything else is done with them."""

    keeps: bool = False
    factor: float = 1.0


WHOLE = Window()  # the batch is a step by itself
