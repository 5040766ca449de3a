"""Define the batch of rows that tables export and import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class RowBatch:
    """Rows on their way out of a table or into one, as they are stored, so that the way is exact.

    ids, last_seen (seconds), count (1 or more): int64 [n]; values: [n, columns] of the config's `values_dtype`, one
    group after the other: floats, or uint8 codes (or bytes, where groups have formats of different dtypes); state:
    float32 [n, state_width], likewise, that of a learned scale after its group's. rows: int64 [n], the row numbers
    they had, or None. scale: float32 [n, groups], 0 for a group without; None if no group has scales. period:
    int64 [n], in which they were added; None in a table that does not keep it, or for rows that come from elsewhere.
    decay: float64 [n, 1 or 2], how far values are decayed, as `decay.py` says; None in a table whose rows do not decay,
    or for rows whose values are as they are now.
    """

    ids: Tensor
    values: Tensor
    state: Tensor
    last_seen: Tensor
    count: Tensor
    rows: Tensor | None = None
    scale: Tensor | None = None
    period: Tensor | None = None
    decay: Tensor | None = None

    def to(self, device: torch.device) -> RowBatch:
        """Return the same rows in the memory of a device."""
        parts: dict[str, Any] = {name: part if part is None else part.to(device) for name, part in vars(self).items()}
        return RowBatch(**parts)
