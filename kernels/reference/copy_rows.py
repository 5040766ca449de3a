"""Copy rows in torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.kernels.reference.gather import gather
from tessera.kernels.reference.scatter import scatter


def copy_rows(source: Sequence[Tensor], rows: Tensor, target: Sequence[Tensor], places: Tensor) -> None:
    for name, chunks, numbers in (("rows", source, rows), ("places", target, places)):
        end = sum(chunk.shape[0] for chunk in chunks)
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
            found = f"{int(numbers.min())} to {int(numbers.max())}"
            raise IndexError(f"{name}: expected below {end}, found {found}")
    if rows.numel():
        scatter(target, places, gather(source, rows, source[0].shape[1], None, None, 0), 0)
