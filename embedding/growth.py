"""Have memory for more rows of a table, or say in one line that there is none.

Tables on a GPU that have no limit of their own share what is free there, first come first served, less a reserve: the
tower takes its memory in the first steps, when tables have begun to grow already, and what torch keeps for it is not
counted as free afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.embedding.config import DynamicTableConfig
from tessera.embedding.errors import TableFull
from tessera.embedding.row_index import RowIndex
from tessera.embedding.row_store import RowStore

RESERVE_SHARE = 0.05  # of the GPU's memory, for the tower
RESERVE_LEAST = 1 << 30  # bytes


def take_rows(
    config: DynamicTableConfig, index: RowIndex, store: RowStore, ids: Tensor, mark: int, period: int
) -> Tensor:
    """Give rows and their memory to distinct, unknown ids (int64 [n]); return the rows, int64 [n].

    Raises TableFull where a GPU has no memory for them or, for a table without a limit, only that of the reserve. Rows
    and ids are then as they were.
    """
    end = index.end_with(ids.numel())
    try:
        if config.row_limit is None:
            check_room(index.device, store.bytes_to_grow(end))
        store.grow_to(end)
        return index.add(ids, mark, period)
    except torch.OutOfMemoryError as error:
        raise full(config, len(index), ids.numel(), error) from error


def reserve(config: DynamicTableConfig, index: RowIndex, store: RowStore, rows: int) -> None:
    """Reserve memory for so many rows of an empty table. Raises TableFull where a GPU has none for them."""
    try:
        index.reserve(rows)
        store.reserve(rows)
    except torch.OutOfMemoryError as error:
        raise full(config, 0, rows, error) from error


def room_for_tables(device: torch.device) -> int | None:
    """Return how many bytes tables on a GPU may still take, all of them together; None on a CPU. Asks the driver and
    does not wait for the GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(max(0, free - max(RESERVE_LEAST, int(total * RESERVE_SHARE))))


def check_room(device: torch.device, wanted: int) -> None:
    """Raise torch.OutOfMemoryError where tables have not so many bytes left."""
    room = room_for_tables(device) if wanted else None
    if room is not None and wanted > room:
        raise torch.OutOfMemoryError(f"{wanted:,} bytes wanted, {room:,} bytes free for tables")


def full(config: DynamicTableConfig, rows: int, wanted: int, error: torch.OutOfMemoryError) -> TableFull:
    """Return what to raise for a table that has so many rows and got no memory for more."""
    why = (str(error).splitlines() or [""])[0].rstrip(".")
    held = rows * config.bytes_per_row
    return TableFull(
        f"table {config.name}: {rows:,} rows in use, {held:,} bytes, {wanted:,} more wanted, and the GPU's memory is "
        f"full ({why}); set max_rows or max_bytes with eviction lru or lfu, or set ttl_seconds"
    )
