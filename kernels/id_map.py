"""Map raw 64-bit ids to row numbers: exact, and growing without ever moving more than one small block.

Extendible hashing. h = mix64(id + 0x9E3779B97F4A7C15), a bijection, stands for the id everywhere inside. (The
plain mix64(id) mod ranks decides which rank owns an id, so its bits are not evenly spread on one rank.) The
`directory` maps the upper bits of h to a segment: a block of SLOTS pairs (h, row), probed linearly from the
beginning of the cache line that the lower bits of h name; row -1 marks an empty slot. A segment that reaches
its limit is split in two by one more upper bit: one block of SLOTS pairs is dealt out again, all others stay.
The limits are staggered over the hash space (`split_limit`), so splits come one by one instead of all at once
whenever the number of ids doubles. Segments live in chunks of memory that are never moved.

One map serves many tables: the upper bits of a slot's second word hold the table (`TABLE_SHIFT`), h is moved by
mix64(table), so that an id that many tables have is looked for in as many places, and hash and table together are
exact. Without a table ids are those of table 0, whose h and words are the plain ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera.kernels import backend
from tessera.kernels.chunks import allocate_chunk, check_index, first_rows, touch_pages
from tessera.kernels.reference import id_map as reference
from tessera.kernels.reference.id_map import LIMIT, SEGMENTS_PER_CHUNK, SLOTS, split_limit

_DIRECTORY_PER_SEGMENT = 64  # a directory much larger than its segments means ids made to collide
_FIRST_SEGMENTS = 4  # of the first chunk on a GPU: 256 KiB
_SURELY_SPLIT = int(1.15 * LIMIT * SLOTS)  # of as many expected ids the limit is eight standard deviations away


class IdMap:
    """A map from int64 ids (any bit pattern) to row numbers >= 0. Both backends work on the same state."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.clear()

    def clear(self) -> None:
        """Forget all ids and give the memory back."""
        device = self.device
        #: int32 [2^g]: the segment of every combination of the g upper bits.
        self._directory = torch.zeros(1, dtype=torch.int32, device=device)
        #: int64 [segments, SLOTS, 2] (`_add_chunk`); only segments in use have been written.
        self._chunks: list[Tensor] = []
        #: int32 [segments, 3]: number of upper bits that all ids of the segment share, ids, limit.
        self._segments = torch.zeros((0, 3), dtype=torch.int32, device=device)
        #: int64 [3], always on the CPU: segments in use, ids, ids done by the last insertion.
        self._counters = torch.zeros(3, dtype=torch.int64, device="cpu")
        self._add_chunk()
        self._chunks[0][0, :, 1] = -1
        self._segments[0] = torch.tensor([0, 0, split_limit(0, 0)])
        self._counters[0] = 1

    def reserve(self, ids: int) -> None:
        """Provide the segments that so many ids split the first one into, before insertion. The map must be empty.

        What is looked for is found as without; it takes no more memory, for only the splits that are sure are done.
        """
        assert not len(self), len(self)
        depth = 0
        while ids >> depth > _SURELY_SPLIT:
            depth += 1
        segments = 1 << depth
        if segments <= int(self._counters[0]):
            return
        while self._segments.shape[0] < segments:
            self._add_chunk()
        used = first_rows(self._chunks, segments)
        touch_pages(used)
        for part in used:
            part[:, :, 1] = -1
        self._directory = torch.arange(segments, dtype=torch.int32, device=self.device)
        limits = [(depth, 0, split_limit(prefix, depth)) for prefix in range(segments)]
        self._segments[:segments] = torch.tensor(limits, dtype=torch.int32)
        self._counters[0] = segments

    def __len__(self) -> int:
        return int(self._counters[1])

    @property
    def nbytes(self) -> int:
        """Bytes in use; the rest of the last chunk is reserved but has not been touched."""
        return int(self._counters[0]) * (SLOTS * 16 + 12) + self._directory.numel() * 4

    @property
    def segments(self) -> Tensor:
        """Of each segment, int32 [segments, 3]: number of upper bits that all its ids share, ids, limit."""
        return self._segments

    @property
    def places(self) -> tuple[Tensor, list[Tensor]]:
        """What ops find ids in: the directory and the chunks of segments. Good until the map changes."""
        return self._directory, self._chunks

    def find(self, ids: Tensor, tables: Tensor | None = None) -> Tensor:
        """Return rows int64 [n] of ids int64 [n] (duplicates allowed), -1 for unknown ids.

        tables: int64 [n], 0 to TABLES - 1 (None: all 0). Raises ValueError for wrong arguments.
        """
        _check(ids, tables)
        ops = backend.ops_for(ids) or reference
        return ops.id_map_find(self._directory, self._chunks, ids, tables)

    def insert(self, ids: Tensor, rows: Tensor, tables: Tensor | None = None) -> None:
        """Add distinct, unknown ids (int64 [n]) with their rows (int64 [n], 0 to 2^40 - 1); tables as `find`.

        Raises ValueError for wrong arguments and for an id that is already known; which of the others went
        in is then not defined.
        """
        _check(ids, tables)
        check_index("rows", rows)
        if ids.numel() != rows.numel():
            raise ValueError(f"rows: expected {ids.numel()}, found {rows.numel()}")
        ops, done = backend.ops_for(ids) or reference, 0
        while done < ids.numel():
            state = self._directory, self._chunks, self._segments, self._counters
            ops.id_map_insert(*state, ids[done:], rows[done:], None if tables is None else tables[done:])
            done += int(self._counters[2])
            if done < ids.numel():
                self._grow()

    def place(self, ids: Tensor, rows: Tensor, tables: Tensor, segments: Tensor) -> None:
        """Add what `insert` takes, on a GPU and without waiting: of ids that `records.find_unknown` listed, with the
        `segments` that it gave. Nothing may have been added since."""
        ops = backend.triton_for(ids)
        assert ops is not None, backend.backend(ids.device.type)
        ops.id_map_place(self._directory, self._chunks, ids, rows, tables)
        self._segments[:, 1] = segments
        self._counters[1] += ids.numel()

    def find_or_insert(self, ids: Tensor, new_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Find ids and insert unknown ones. ids: int64 [n], distinct; new_rows: int64 [m], one for each unknown id or
        more.

        The k-th unknown id, in order of position, takes new_rows[k]. Returns (rows int64 [n], positions of
        the new ids int64 [k], ascending). Raises ValueError for wrong arguments and too few new rows.
        """
        rows = self.find(ids)
        new = (rows < 0).nonzero().flatten()
        if new.numel() > new_rows.numel():
            raise ValueError(f"new_rows: expected {new.numel()} or more, found {new_rows.numel()}")
        if new.numel():
            taken = new_rows[: new.numel()]
            self.insert(ids[new], taken)
            rows[new] = taken
        return rows, new

    def erase(self, ids: Tensor, tables: Tensor | None = None) -> Tensor:
        """Remove ids (int64 [n], distinct; tables as `find`). Returns the rows they had, int64 [n], -1 for unknown
        ids."""
        _check(ids, tables)
        state = self._directory, self._chunks, self._segments, self._counters
        ops = backend.ops_for(ids) or reference
        return ops.id_map_erase(*state, ids, tables)

    def erase_places(self, places: Tensor) -> Tensor:
        """Remove known ids, on a GPU and without waiting, by their places (int64 [n]: segment * SLOTS + slot). Returns
        how many each segment has lost, int32 [segments]."""
        ops = backend.triton_for(places)
        assert ops is not None, backend.backend(places.device.type)
        state = self._directory, self._chunks, self._segments, self._counters
        gone: Tensor = ops.erase_places(*state, places)
        self._counters[1] -= places.numel()
        return gone

    def items(self, batch: int = 1 << 20) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids int64 [k], rows int64 [k]), at most max(batch, SLOTS) at a time, in no useful order.

        The map must not change meanwhile.
        """
        in_use = int(self._counters[0])
        step = max(1, min(batch // SLOTS, SEGMENTS_PER_CHUNK))
        for chunk in first_rows(self._chunks, in_use):
            for block in chunk.split(step):
                slots = block.reshape(-1, 2)
                slots = slots[slots[:, 1] >= 0]
                tables = reference.table_of(slots[:, 1])
                yield reference.id_of(slots[:, 0], tables), reference.row_of(slots[:, 1])

    def _grow(self) -> None:
        """Provide what the last insertion stopped for: a chunk, or one more bit in the directory."""
        if int(self._counters[0]) == self._segments.shape[0]:
            self._add_chunk()
            return
        if self._directory.numel() >= _DIRECTORY_PER_SEGMENT * self._segments.shape[0]:
            raise RuntimeError(
                f"id map: {self._directory.numel()} directory entries for {int(self._counters[0])} segments; "
                "the ids were made to collide under mix64"
            )
        self._directory = self._directory.repeat_interleave(2)

    def _add_chunk(self) -> None:
        """Add SEGMENTS_PER_CHUNK segments. On a GPU, which has no memory that costs nothing before it is written, the
        first chunk is small and each further one as large as all before it, up to that many."""
        size, reserved = SEGMENTS_PER_CHUNK, self._segments.shape[0]
        if self.device.type != "cpu":
            size = min(max(reserved, _FIRST_SEGMENTS), SEGMENTS_PER_CHUNK)
        self._chunks.append(allocate_chunk((size, SLOTS, 2), torch.int64, self.device))
        more = self._segments.new_zeros((size, 3))
        self._segments = torch.cat([self._segments, more])


def _check(ids: Tensor, tables: Tensor | None) -> None:
    check_index("ids", ids)
    if tables is not None:
        check_index("tables", tables)


@torch.library.register_fake("tessera::id_map_find")
def _find_fake(directory: Tensor, chunks: list[Tensor], ids: Tensor, tables: Tensor | None) -> Tensor:
    return ids.new_empty(ids.shape)


@torch.library.register_fake("tessera::id_map_erase")
def _erase_fake(
    directory: Tensor,
    chunks: list[Tensor],
    segments: Tensor,
    counters: Tensor,
    ids: Tensor,
    tables: Tensor | None,
) -> Tensor:
    return ids.new_empty(ids.shape)
