"""Describe a sharding plan in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TableSize:
    """Size of one table over all ranks. `row_bytes`: values, optimizer state and bookkeeping of one row.

    summed_by_owner: whether its bags travel as sums instead of rows. cache_rows: rows of one rank that are on the
    device, if the table is on the host.
    """

    name: str
    features: tuple[str, ...]
    rows: int
    dim: int
    row_bytes: int
    summed_by_owner: bool = False
    cache_rows: int | None = None

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


def describe(sizes: Sequence[TableSize], ranks: int, device: str, memory_per_rank: int) -> str:
    """Return the plan as text: a heading that says why, one line per table, and a closing line that adds up."""
    lines = [
        f"{len(sizes)} tables, row-wise over {ranks} rank{'s' if ranks > 1 else ''} on {device}: "
        "rows are spread evenly by a mixed id, so no rank is a hot spot",
        f"{'table':<24}{'rows':>14}{'dim':>6}{'bytes/row':>11}{'in all':>12}{'per rank':>12}  features",
    ]
    for table in sizes:
        note = " (bags summed by owners)" if table.summed_by_owner else ""
        if table.cache_rows is not None:
            note += f" (on the host, {table.cache_rows:,} rows of each rank on the device)"
        lines.append(
            f"{table.name:<24}{table.rows:>14,}{table.dim:>6}{table.row_bytes:>11}{size(table.bytes):>12}"
            f"{size(-(-table.bytes // ranks)):>12}  {', '.join(table.features)}{note}"
        )
    total = sum(table.bytes for table in sizes)
    lines.append(f"in all {size(total)}, {size(-(-total // ranks))} per rank of {size(memory_per_rank)}")
    return "\n".join(lines)


def sums_are_smaller(bags: int, ids: int, rows: int, width: int, ranks: int, *, weighted: bool = False) -> bool:
    """Return whether a table moves fewer bytes per step with the pooled output dist (sums of owners) than with rows of
    distinct ids.

    Per rank, without the share that stays: a distinct id costs its 8 bytes, a 4-byte count, and a row of `width` floats
    there and one of gradients back. With pooling each id of each bag travels (8 bytes, and 4 of its weight), and
    each bag has a sum from every rank and its gradient to every rank. Of `ids` drawn from `rows`,
    rows * (1 - exp(-ids / rows)) are distinct if all are equally likely; in skewed data fewer are, which favours rows.

    Args:
        bags: of one rank and step, over all features of the table; ids: in these bags; rows: of the table.
    """
    distinct = rows * -math.expm1(-ids / rows)
    per_id = 12 if weighted else 8
    return ranks > 1 and per_id * ids + 8 * width * bags * ranks < (12 + 8 * width) * distinct


def size(count: float) -> str:
    """Format bytes with a unit: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
