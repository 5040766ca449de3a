"""Give kernels the addresses of a table's chunks in device memory, so that one kernel reaches all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_KEPT = "_tessera_bases"  # an attribute of a table's first chunk


class Chunk(NamedTuple):
    """The shape of a table's chunks, as a constant of kernels: 2^shift rows of `bytes` bytes."""

    shift: int
    bytes: int


class Place(NamedTuple):
    """bases: int64 [chunks], addresses; rows below `total` exist."""

    bases: Tensor
    chunk: Chunk
    total: int


def place_of(chunks: Sequence[Tensor], device: torch.device) -> Place:
    """Return the place of a table's rows. Raises ValueError unless all chunks are contiguous and alike."""
    if not chunks:
        return Place(torch.zeros(1, dtype=torch.int64, device=device), Chunk(0, 1), 0)
    first = chunks[0]
    size = first.shape[0]
    chunk = Chunk(size.bit_length() - 1, first.shape[1] * first.element_size())
    return Place(bases_of(chunks, device), chunk, size * len(chunks))


def bases_of(chunks: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return addresses of chunks, int64 [chunks] on the device. Raises as `place_of`.

    Chunks are appended to a table and never moved, so the addresses are sent to the device once per growth: they are
    kept with the first chunk, which every list of the table's chunks begins with.
    """
    first, last = chunks[0], chunks[-1]
    kept = getattr(first, _KEPT, None)
    if kept is not None and kept[0].numel() == len(chunks) and kept[1] == last.data_ptr():
        return kept[0]
    for chunk in chunks:
        if chunk.shape != first.shape or chunk.dtype != first.dtype or not chunk.is_contiguous():
            raise ValueError(f"chunks: expected all contiguous and like the first, found {list(chunk.shape)}")
        if chunk.device != device:
            raise ValueError(f"chunks: expected on {device} as the rows are, found one on {chunk.device}")
    bases = torch.tensor([chunk.data_ptr() for chunk in chunks], dtype=torch.int64, device=device)
    setattr(first, _KEPT, (bases, last.data_ptr()))
    return bases


def blocks_of(chunks: Sequence[Tensor], size: int) -> list[int]:
    """Return the addresses of blocks of `size` rows, a power of two, of which chunks consist."""
    found: list[int] = []
    for chunk in chunks:
        if not chunk.is_contiguous() or size & (size - 1) or chunk.shape[0] % size:
            raise ValueError(f"chunks: expected contiguous, of {size} rows or multiples, found {list(chunk.shape)}")
        step = size * chunk.stride(0) * chunk.element_size()
        found += range(chunk.data_ptr(), chunk.data_ptr() + chunk.shape[0] // size * step, step)
    return found
