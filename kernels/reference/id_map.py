"""The id map in torch, on the state that `kernels/id_map.py` describes.

Where an id sits inside its segment may differ from the compiled version; what is found may not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tessera.kernels.reference.bits import shift_right, signed
from tessera.kernels.reference.mix import mix64, unmix64
from tessera.kernels.reference.random import GOLDEN

SLOTS = 4096  # per segment, a power of two
LINE = 4  # slots; a search begins at a multiple of this: the slots of one cache line
SEGMENTS_PER_CHUNK = 256
# A segment is split at LIMIT * SLOTS ids at the lower end of the hash space, at 2^-SPREAD times that at its
# upper end. SPREAD = 1 would spread the splits evenly over each doubling, 0 would make them coincide.
LIMIT = 0.8
SPREAD = 0.5
TABLE_SHIFT = 40  # the second word of a slot: the row in the bits below, the table in those from here on
TABLES = 1 << 23  # most tables of a map: a word stays positive


def split_limit(prefix: int, depth: int) -> int:
    """Return the most ids that the segment with the `depth` upper bits `prefix` holds."""
    return int(SLOTS * LIMIT * 2.0 ** (-SPREAD * prefix / 2**depth))


def hash_of(ids: Tensor, tables: Tensor | None = None) -> Tensor:
    hashes = mix64(ids + signed(GOLDEN))
    return hashes if tables is None else hashes ^ mix64(tables)


def id_of(hashes: Tensor, tables: Tensor | None = None) -> Tensor:
    return unmix64(hashes if tables is None else hashes ^ mix64(tables)) - signed(GOLDEN)


def row_of(words: Tensor) -> Tensor:
    """Return the rows in the second words of slots, -1 for -1."""
    return torch.where(words < 0, -1, words & (1 << TABLE_SHIFT) - 1)


def table_of(words: Tensor) -> Tensor:
    """Return the tables in the second words of slots, -1 for -1."""
    return words >> TABLE_SHIFT


def tables_of(ids: Tensor, tables: Tensor | None) -> Tensor:
    """Return the table of each id, 0 where none is said. Raises ValueError for one out of range."""
    if tables is None:
        return torch.zeros_like(ids)
    if tables.numel() != ids.numel():
        raise ValueError(f"tables: expected {ids.numel()}, found {tables.numel()}")
    if tables.numel() and not 0 <= int(tables.min()) <= int(tables.max()) < TABLES:
        raise ValueError(f"tables: expected 0 to {TABLES - 1}, found {int(tables.min())} to {int(tables.max())}")
    return tables


def id_map_find(directory: Tensor, chunks: Sequence[Tensor], ids: Tensor, tables: Tensor | None) -> Tensor:
    tables = tables_of(ids, tables)
    hashes = hash_of(ids, tables)
    words = torch.full_like(ids, -1)
    for slots, positions, start in _by_chunk(chunks, _segment_of(directory, hashes)):
        wanted = hashes[positions]
        words[positions] = _probe(slots, start, wanted, tables[positions], _home(start, wanted))[1]
    return row_of(words)


def id_map_insert(
    directory: Tensor,
    chunks: Sequence[Tensor],
    segments: Tensor,
    counters: Tensor,
    ids: Tensor,
    rows: Tensor,
    tables: Tensor | None,
) -> None:
    """Insert all ids, or none where memory or a bit of the directory is missing; counters[2] tells."""
    counters[2] = 0
    tables = tables_of(ids, tables)
    distinct = torch.stack([ids, tables]).unique(dim=1).shape[1]
    if bool((id_map_find(directory, chunks, ids, tables) >= 0).any()) or distinct < ids.numel():
        raise ValueError("ids: expected distinct, unknown ids, found one that is already known")
    if bool(((rows < 0) | (rows >> TABLE_SHIFT > 0)).any()):
        raise ValueError(f"rows: expected 0 to 2^{TABLE_SHIFT} - 1")
    hashes = hash_of(ids, tables)
    while True:
        segment = _segment_of(directory, hashes)
        wanted = segments[:, 1] + torch.bincount(segment, minlength=segments.shape[0])
        full = (wanted > segments[:, 2]) & (wanted > segments[:, 1])
        full = full.nonzero().flatten()[: segments.shape[0] - int(counters[0])]
        if full.numel() == 0:
            break
        if bool((2 ** segments[full, 0].long() == directory.numel()).any()):
            return
        _split(directory, chunks, segments, counters, full)
    if bool((wanted > segments[:, 2]).any()):
        return
    _place(chunks, segment, hashes, rows | tables << TABLE_SHIFT)
    segments[:, 1] = wanted
    counters[1] += ids.numel()
    counters[2] = ids.numel()


def id_map_erase(
    directory: Tensor,
    chunks: Sequence[Tensor],
    segments: Tensor,
    counters: Tensor,
    ids: Tensor,
    tables: Tensor | None,
) -> Tensor:
    tables = tables_of(ids, tables)
    hashes = hash_of(ids, tables)
    segment = _segment_of(directory, hashes)
    words = torch.full_like(ids, -1)
    for slots, positions, start in _by_chunk(chunks, segment):
        wanted = hashes[positions]
        slot, found = _probe(slots, start, wanted, tables[positions], _home(start, wanted))
        slots[slot[found >= 0], 1] = -1
        words[positions] = found
    known = words >= 0
    # A hole would end the probing of ids behind it: the others of these segments are placed again.
    _place(chunks, *_take_out(chunks, segment[known].unique()))
    segments[:, 1] -= torch.bincount(segment[known], minlength=segments.shape[0])
    counters[1] -= known.sum().to(counters.device)
    return row_of(words)


def _segment_of(directory: Tensor, hashes: Tensor) -> Tensor:
    """Return the segment of every hash: int64 [n]."""
    bits = directory.numel().bit_length() - 1
    entry = shift_right(hashes, 64 - bits) if bits else torch.zeros_like(hashes)
    return directory[entry].long()


def _by_chunk(chunks: Sequence[Tensor], segment: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (slots [k, 2] of a chunk, positions in `segment`, first slot of each one's segment)."""
    ends = torch.tensor([chunk.shape[0] for chunk in chunks], device=segment.device).cumsum(0)
    number = torch.bucketize(segment, ends, right=True)
    for chunk in number.unique().tolist():
        positions = (number == chunk).nonzero().flatten()
        first = int(ends[chunk]) - chunks[chunk].shape[0]
        yield chunks[chunk].view(-1, 2), positions, (segment[positions] - first) * SLOTS


def _home(start: Tensor, hashes: Tensor) -> Tensor:
    """Return the slot at which the search for a hash starts, in the segment that begins at `start`."""
    return start + (hashes & (SLOTS - LINE))


def _probe(slots: Tensor, start: Tensor, hashes: Tensor, tables: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Return (slot, its second word) of every key, from `slot` on in its segment; -1 with the empty slot met."""
    slot = slot.clone()
    word = torch.full_like(hashes, -1)
    active = torch.arange(hashes.numel(), device=hashes.device)
    while active.numel():
        entry = slots[slot[active]]
        hit = (entry[:, 0] == hashes[active]) & (table_of(entry[:, 1]) == tables[active])
        word[active] = torch.where(hit, entry[:, 1], -1)
        active = active[~hit & (entry[:, 1] >= 0)]
        slot[active] = start[active] + (slot[active] + 1 & SLOTS - 1)
    return slot, word


def _place(chunks: Sequence[Tensor], segment: Tensor, hashes: Tensor, words: Tensor) -> None:
    """Write new pairs into the first empty slots of their segments; one of those that meet wins and stays."""
    for slots, positions, start in _by_chunk(chunks, segment):
        slot = _home(start, hashes[positions])
        claims = positions.new_empty(slots.shape[0])
        while positions.numel():
            slot = _probe(slots, start, hashes[positions], table_of(words[positions]), slot)[0]
            claims[slot] = positions
            won = claims[slot] == positions
            slots[slot[won]] = torch.stack([hashes[positions[won]], words[positions[won]]], dim=1)
            positions, start, slot = positions[~won], start[~won], slot[~won]


def _take_out(chunks: Sequence[Tensor], of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty the segments `of`. Returns what they held: (segment, hash, row)."""
    held = [(of.new_empty(0), of.new_empty(0), of.new_empty(0))]
    for slots, positions, start in _by_chunk(chunks, of):
        slot = start[:, None] + torch.arange(SLOTS, device=of.device)
        pairs = slots[slot]
        used = pairs[:, :, 1] >= 0
        owner = of[positions][:, None].expand_as(used)
        held.append((owner[used], pairs[:, :, 0][used], pairs[:, :, 1][used]))
        slots[slot.flatten(), 1] = -1
    segment, hashes, rows = (torch.cat(parts) for parts in zip(*held, strict=True))
    return segment, hashes, rows


def _split(directory: Tensor, chunks: Sequence[Tensor], segments: Tensor, counters: Tensor, full: Tensor) -> None:
    """Deal each of the segments `full` out to itself (next upper bit 0) and a new segment (1)."""
    first = int(counters[0])
    new = torch.arange(first, first + full.numel(), device=full.device)
    counters[0] += full.numel()
    for slots, _, start in _by_chunk(chunks, new):
        slots[(start[:, None] + torch.arange(SLOTS, device=full.device)).flatten(), 1] = -1
    bits = directory.numel().bit_length() - 1
    depth = segments[full, 0].long() + 1
    sibling = torch.full((segments.shape[0],), -1, device=full.device).scatter_(0, full, new)
    entry = torch.arange(directory.numel(), device=full.device)
    upper = (entry >> (bits - segments[directory.long(), 0].long() - 1).clamp(min=0)) & 1
    moves = (sibling[directory.long()] >= 0) & (upper == 1)
    directory[moves] = sibling[directory[moves].long()].to(directory.dtype)

    _, hashes, rows = _take_out(chunks, full)
    segments[full, 0] += 1
    segments[new, 0] = depth.to(segments.dtype)
    both = torch.cat([full, new])
    for one in both.tolist():
        prefix = int((directory == one).nonzero()[0]) >> (bits - int(segments[one, 0]))
        segments[one, 2] = split_limit(prefix, int(segments[one, 0]))
    segment = _segment_of(directory, hashes)
    _place(chunks, segment, hashes, rows)
    segments[both, 1] = torch.bincount(segment, minlength=segments.shape[0])[both].to(segments.dtype)
