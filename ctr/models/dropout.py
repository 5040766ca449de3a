"""Dropout whose masks do not depend on how the rows of a batch are spread over ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tessera.embedding.config import key_of
from tessera.embedding.errors import ConfigError
from tessera.kernels.random import row_keys, uniform

DROPOUT = key_of("dropout")


class Dropout(nn.Module):
    """Sets each unit of a row to zero with probability `p` in training, and divides the others by 1 - p.

    Whether a unit stays is a function of (seed, training step, the row's place in the epoch, layer, unit): the same on
    any number of ranks, in a run that is resumed, and in both passes of a step that learns scales. `Network` tells
    the layer its number and, before each step, the keys of the batch's rows (`draw_masks`). A layer that nobody tells
    draws as torch's does.

    Attributes:
        layer: number of this layer among the dropout layers of its tower.
        keys: int64 [B], what the masks of each row are drawn by; None: outside of a `Network`.
    """

    def __init__(self, p: float, key: str = "model.dropout") -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"{key} is {p}; expected 0 or more and less than 1")
        self.p, self.layer = p, 0
        self.keys: Tensor | None = None

    def forward(self, rows: Tensor, keys: Tensor | None = None, part: int = 0) -> Tensor:
        """Return rows [B, ...] with units dropped, in the same shape. `keys` are given where `rows` are a piece of the
        batch; `part` tells several tensors of one layer apart, such as attention heads."""
        if not self.training or self.p == 0:
            return rows
        keys = self.keys if keys is None else keys
        if keys is None:
            return F.dropout(rows, self.p)
        drawn = uniform(self.layer, part, keys, rows[0].numel() if len(rows) else 1).view(rows.shape)
        return rows * drawn.ge_(self.p).mul_(1 / (1 - self.p)).to(rows.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropout_layers(tower: nn.Module) -> list[Dropout]:
    """Return the dropout layers of a tower, numbered in the order of its modules."""
    layers = [module for module in tower.modules() if isinstance(module, Dropout) and module.p]
    for number, layer in enumerate(layers):
        layer.layer = number
    return layers


def draw_masks(layers: list[Dropout], seed: int, step: int, place: Tensor | None) -> None:
    """Give the layers the keys of a batch's rows. place: int64 [B], where in the epoch's order each row stands; without
    layers nobody asks for it."""
    if layers:
        assert place is not None, "the reader does not say where the rows stand"
        keys = row_keys(seed, DROPOUT, place, step)
        for layer in layers:
            layer.keys = keys
