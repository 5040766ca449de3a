"""Erase ids from the id map in device memory.

A hole would end the search for ids behind it. So slots are emptied first, all of them, and then one program for each
segment that has lost ids reads what is left of it, empties it and places its pairs again. The host need not know which
segments these are: programs of the others see at once that there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.reference.id_map import SLOTS
from tessera.kernels.triton_ops.id_map import Map, home_of, same_length, slots_of
from tessera.kernels.triton_ops.launch import block, kernel, launch

_SLOTS = tl.constexpr(SLOTS)
_WARPS = 16  # of a program that holds a segment: eight pairs in each thread


@kernel
def _clear_kernel(places, gone, bases, count, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Empty slots, whatever is left of lines' order, and count them by segment; -1 is skipped."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + at, mask=at < count, other=-1)
    known = place >= 0
    pair = slots_of(bases, place // _SLOTS, known, SHIFT) + (place % _SLOTS) * 2
    tl.store(pair + 1, tl.full([BLOCK], -1, tl.int64), mask=known)
    one = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_add(gone + place // _SLOTS, one, mask=known, sem="relaxed")


@kernel
def _mend_kernel(segments, gone, bases, SHIFT: tl.constexpr):
    """Place the pairs of a segment again if some have gone."""
    segment = tl.program_id(0).to(tl.int64)
    lost = tl.load(gone + segment)
    if lost > 0:
        count = segments + segment * 3 + 1
        tl.store(count, tl.load(count) - lost)
        at = tl.arange(0, _SLOTS).to(tl.int64)
        slots = slots_of(bases, segment + at * 0, at >= 0, SHIFT)
        hash = tl.load(slots + at * 2).to(tl.uint64, bitcast=True)
        word = tl.load(slots + at * 2 + 1)
        tl.debug_barrier()  # nothing is emptied before all has been read
        tl.store(slots + at * 2 + 1, tl.full([_SLOTS], -1, tl.int64))
        tl.debug_barrier()  # nor claimed before all is empty
        active = word >= 0
        slot = home_of(hash)
        turns = 0
        while (turns < _SLOTS) & (tl.max(active.to(tl.int32), axis=0) > 0):
            pair = slots + slot * 2
            old = tl.atomic_cas(pair + 1, tl.where(active, -1, -2).to(tl.int64), tl.where(active, word, -2))
            won = active & (old == -1)
            tl.store(pair, hash.to(tl.int64, bitcast=True), mask=won)
            active = active & ~won
            slot = tl.where(active, (slot + 1) & (_SLOTS - 1), slot)
            turns += 1


def erase_places(
    directory: Tensor, chunks: Sequence[Tensor], segments: Tensor, counters: Tensor, places: Tensor
) -> Tensor:
    """Erase what is at places (int64 [n], as `Map.find` gives them). Returns how many ids each segment has lost, int32
    [segments]. The host does not wait; `counters` does not change."""
    found = Map(directory, chunks)
    gone = torch.zeros(segments.shape[0], dtype=segments.dtype, device=places.device)
    arguments = (places, gone, found.bases, places.numel())
    launch(_clear_kernel, -(-places.numel() // block()), *arguments, SHIFT=found.shift, BLOCK=block())
    launch(_mend_kernel, int(counters[0]), segments, gone, found.bases, SHIFT=found.shift, warps=_WARPS)
    return gone


def id_map_erase(
    directory: Tensor,
    chunks: Sequence[Tensor],
    segments: Tensor,
    counters: Tensor,
    ids: Tensor,
    tables: Tensor | None,
) -> Tensor:
    rows, places = Map(directory, chunks).find(ids, same_length(ids, tables), with_places=True)
    gone = erase_places(directory, chunks, segments, counters, places)
    counters[1] -= int(gone.sum())
    return rows
