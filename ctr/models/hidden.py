"""What the last layer of a tower reads of a row: where a row lies in the eyes of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tessera.ctr.models.tower import Tower
from tessera.embedding.errors import ConfigError

LAST = ("mlp", "head", "output")  # parts of towers that may end in their last layer


def last_layer(tower: Tower) -> nn.Linear:
    """Return the linear layer that gives a tower's logit, of its MLP where it has one.

    Raises ConfigError: it has none, or several labels.
    """
    inner = getattr(tower, "classifier", None)
    if isinstance(inner, Tower):
        return last_layer(inner)
    for name in LAST:
        part: Any = getattr(tower, name, None)
        layer = part[-1] if isinstance(part, nn.Sequential) and len(part) else part
        if isinstance(layer, nn.Linear) and layer.out_features == 1:
            return layer
    raise ConfigError(
        f"model {type(tower).__name__} has no layer whose input an error memory could know rows by; expected a model "
        "of one label that ends in an MLP, as dnn, deepfm or dcn_v2"
    )


class Hidden:
    """The rows that went through the last layer since they were taken last."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def keep(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Remember a part of the batch: a forward pre-hook. Of several readings of a row the mean is kept."""
        rows = inputs[0]
        self._parts.append(rows if rows.dim() == 2 else rows.flatten(1, -2).mean(1))

    def take(self) -> Tensor:
        """Return them, float32 [n, H], and forget them."""
        parts, self._parts = self._parts, []
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()


@contextmanager
def hidden_of(tower: Tower) -> Iterator[Hidden]:
    """Keep what the last layer of a tower reads, pass by pass, inside of the context.

    Raises ConfigError: as `last_layer`.
    """
    hidden = Hidden()
    hook = last_layer(tower).register_forward_pre_hook(hidden.keep)
    try:
        yield hidden
    finally:
        hook.remove()
