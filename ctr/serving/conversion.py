"""Rows of one format become rows of another, rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tessera.ctr.serving.description import StoredGroup
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.saved_models import RowPart
from tessera.kernels.formats import BITS, code_range, is_int, stored_columns, stored_dtype
from tessera.kernels.layout import packed_layout
from tessera.kernels.quantise import dequantise, quantise

Note = Callable[[str, Tensor, Tensor], None]  # group, values before, values after
SCALE = 1e-3  # of rows of zeros


def chosen_format(stored: str, wanted: str | None, dim: int) -> str:
    """Return the format of an exported group: the wanted one where rows become smaller, else the stored one."""
    if wanted is None or BITS[wanted] >= BITS[stored]:
        return stored
    # A row of few values would not become smaller: it has a scale beside them and fills whole words.
    return wanted if packed_layout(wanted, dim, "sgd").bytes < 4 * dim else stored


class Conversion:
    """Converts the rows of one table.

    stored: name, dim and format of each group as training has them. groups: as the export has them. note: told of each
    group that is rounded.
    """

    def __init__(
        self, stored: Sequence[tuple[str, int, str]], groups: Sequence[StoredGroup], note: Note | None = None
    ) -> None:
        if [one[:2] for one in stored] != [(group.name, group.dim) for group in groups]:
            raise ExportError(f"rows have groups {list(stored)}; the export has {[(g.name, g.dim) for g in groups]}")
        self._formats, self._groups, self._note = [one[2] for one in stored], groups, note

    def columns(self, part: RowPart) -> list[np.ndarray]:
        """Return ids, then values and scales of each group, then decay, as `TableWriter.add` takes them."""
        found: list[np.ndarray] = [part.ids]
        at = 0
        for number, (format, group) in enumerate(zip(self._formats, self._groups, strict=True)):
            width = stored_columns(format, group.dim) * stored_dtype(format).itemsize
            piece = np.ascontiguousarray(part.values[:, at : at + width])
            if piece.shape[1] != width:
                raise ExportError(f"rows of group {group.name} have {piece.shape[1]} bytes; expected {width}")
            at += width
            scales = None
            if is_int(format):
                if part.scales is None:
                    raise ExportError(f"rows of group {group.name} are {format} and have no scales")
                scales = np.ascontiguousarray(part.scales[:, number])
            found += self._one(torch.from_numpy(piece).view(stored_dtype(format)), scales, format, group)
        return found + ([] if part.decay is None else [part.decay])

    def _one(self, stored: Tensor, scales: np.ndarray | None, format: str, group: StoredGroup) -> list[np.ndarray]:
        sizes = None if scales is None else torch.from_numpy(scales)
        if format != group.format:
            floats = dequantise(stored, sizes, format, group.dim)
            return self.floats(floats, group)
        return [_numpy(stored), *([] if scales is None else [scales])]

    def floats(self, floats: Tensor, group: StoredGroup) -> list[np.ndarray]:
        """Return values and scales of rows given as float32 [n, dim]."""
        sizes = None
        if is_int(group.format):
            low, high = code_range(group.format)
            needed = torch.maximum(floats.amax(dim=1) / high, floats.amin(dim=1) / low)
            sizes = torch.where(needed > 0, needed, torch.full_like(needed, SCALE))
        stored = quantise(floats, sizes, group.format, rounding="nearest")
        if self._note is not None and group.format != "fp32":
            self._note(group.name, floats, dequantise(stored, sizes, group.format, group.dim))
        return [_numpy(stored), *([] if sizes is None else [sizes.numpy()])]


def _numpy(stored: Tensor) -> np.ndarray:
    return stored.view(torch.int16).numpy().view(np.uint16) if stored.dtype == torch.bfloat16 else stored.numpy()
