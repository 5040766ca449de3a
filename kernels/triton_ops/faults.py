"""Record numbers out of range in kernels: noted on the device, raised when the host looks.

A kernel skips what is out of range. The note is one tensor per device, int64 [5]; reading it waits for the device, so
it is read where the host waits anyway, by `check`, and after every op under the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.triton_ops import launch

# Places in the note, and what each holds where nothing was met.
ROW = tl.constexpr(0)  # the largest row number beyond the table
ABOVE = tl.constexpr(1)  # the largest inverse beyond the rows
BELOW = tl.constexpr(2)  # the smallest inverse below 0
OFFSETS = tl.constexpr(3)  # 1: offsets that decrease or leave the positions
DUPLICATES = tl.constexpr(4)  # 1: an insertion into an id map met an id twice
CLEAN = (-1, -1, 0, 0, 0)


@dataclass
class _Limits:
    """The limits of row numbers and of inverse that all launches since the last check had in common; None where they
    differ, because the note does not tell which launch met the fault."""

    rows: int | None
    positions: int | None

    def meet(self, rows: int, positions: int) -> None:
        self.rows = rows if rows == self.rows else None
        self.positions = positions if positions == self.positions else None


_notes: dict[torch.device, Tensor] = {}
_limits: dict[torch.device, _Limits] = {}


def note_of(device: torch.device, rows: int, positions: int = 0) -> Tensor:
    """Return the note for a kernel that is about to run; rows and positions: the limits of row numbers and of
    inverse."""
    if device in _limits:
        _limits[device].meet(rows, positions)
    else:
        _limits[device] = _Limits(rows, positions)
    return _note(device)


def plain_note(device: torch.device) -> Tensor:
    """Return the note for a kernel that has neither rows nor an inverse to note."""
    return _note(device)


def _note(device: torch.device) -> Tensor:
    if device not in _notes:
        _notes[device] = torch.tensor(CLEAN, device=device)
    return _notes[device]


def check(device: torch.device) -> None:
    """Raise IndexError if a kernel on this device met a number out of range since the last check, ValueError if an
    insertion met an id twice. Waits for the device."""
    note = _notes.get(device)
    if note is None or launch.recorder is not None:
        return
    found = note.tolist()
    limits = _limits.pop(device, _Limits(None, None))
    if found == list(CLEAN):
        return
    del _notes[device]
    if found[0] != CLEAN[0]:
        raise IndexError(f"rows: {_expected(limits.rows, 'the rows of the table')}, found {found[0]}")
    if found[3] != CLEAN[3]:
        raise IndexError("offsets must not decrease and must stay inside the positions")
    if found[4] != CLEAN[4]:
        raise ValueError("ids: expected distinct, unknown ids, found one that is already known")
    wrong = found[1] if found[1] != CLEAN[1] else found[2]
    raise IndexError(f"inverse: {_expected(limits.positions, 'the rows given')}, found {wrong}")


def _expected(limit: int | None, otherwise: str) -> str:
    return f"expected inside {otherwise}" if limit is None else f"expected below {limit}"


def note_duplicates(met: Tensor) -> None:
    """Note that an insertion met an id twice if met (bool []) is true."""
    place = _note(met.device)[DUPLICATES.value]
    torch.maximum(place, met.to(torch.int64), out=place)
    check_interpreted(met.device)


def check_interpreted(device: torch.device) -> None:
    """Call `check` if it costs nothing: under the interpreter."""
    if launch.INTERPRETED:
        check(device)


@triton.jit
def known_rows(rows, inside, total, note):
    """Return whether rows are in the table: -1 is not; one beyond the table is noted."""
    tl.atomic_max(note + ROW + tl.zeros_like(rows), rows, mask=inside & (rows >= total), sem="relaxed")
    return inside & (rows >= 0) & (rows < total)


@triton.jit
def known_positions(positions, inside, count, note):
    """Return whether positions are in [0, count); others are noted."""
    zeros = tl.zeros_like(positions)
    tl.atomic_max(note + ABOVE + zeros, positions, mask=inside & (positions >= count), sem="relaxed")
    tl.atomic_min(note + BELOW + zeros, positions, mask=inside & (positions < 0), sem="relaxed")
    return inside & (positions >= 0) & (positions < count)
