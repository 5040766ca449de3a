"""Update time and count per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops.arithmetic import address_of
from tessera.kernels.triton_ops.faults import check, check_interpreted, known_rows, note_of
from tessera.kernels.triton_ops.launch import block, kernel, launch
from tessera.kernels.triton_ops.rows import place_of


class _Given(NamedTuple):
    rows: Tensor
    now: Tensor
    counts: Tensor
    bases: Tensor
    note: Tensor


@kernel
def _touch_kernel(
    given,
    count,
    total,
    ONE_TIME: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.load(given.rows + at, mask=inside, other=-1)
    known = known_rows(row, inside, total, given.note)
    first = address_of(given.bases, row, known, CHUNK).to(tl.pointer_type(tl.int64))
    seen = tl.load(first, mask=known, other=0)
    often = tl.load(first + 1, mask=known, other=0)
    time = tl.load(given.now + (at * 0 if ONE_TIME else at), mask=known, other=0)
    more = tl.full([BLOCK], 1, tl.int64)
    if HAS_COUNTS:
        more = tl.load(given.counts + at, mask=known, other=0)
    tl.store(first, tl.where(often == 0, time, tl.maximum(seen, time)), mask=known)
    tl.store(first + 1, often + more, mask=known)


def touch(chunks: Sequence[Tensor], rows: Tensor, now: Tensor, counts: Tensor | None) -> None:
    place = place_of(chunks, rows.device)
    rows, now, note = rows.contiguous(), now.contiguous(), note_of(rows.device, place.total)
    launch(
        _touch_kernel,
        -(-rows.numel() // block()),
        _Given(rows, now, rows if counts is None else counts.contiguous(), place.bases, note),
        rows.numel(),
        place.total,
        ONE_TIME=now.numel() == 1,
        HAS_COUNTS=counts is not None,
        CHUNK=place.chunk,
        BLOCK=block(),
        warps=1,
    )
    check_interpreted(rows.device)


@kernel
def _expired_kernel(out, bases, begin, limit, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    first = address_of(bases, at + begin, inside, CHUNK).to(tl.pointer_type(tl.int64))
    seen = tl.load(first, mask=inside, other=0)
    often = tl.load(first + 1, mask=inside, other=0)
    tl.store(out + at, ((often > 0) & (seen <= limit)).to(tl.int8), mask=inside)


def expired(chunks: Sequence[Tensor], limit: int, begin: int, end: int) -> Tensor:
    device, count = chunks[0].device, end - begin
    place = place_of(chunks, device)
    old = torch.empty(count, dtype=torch.int8, device=device)
    launch(
        _expired_kernel,
        -(-count // block()),
        old,
        place.bases,
        begin,
        limit,
        count,
        CHUNK=place.chunk,
        BLOCK=block(),
    )
    check(device)
    return old.nonzero().flatten() + begin
