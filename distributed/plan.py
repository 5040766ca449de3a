"""A sharding plan in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TableSize:
    """What one table takes over all ranks. `row_bytes`: values, optimizer state and bookkeeping of one row."""

    name: str
    features: tuple[str, ...]
    rows: int
    dim: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


def describe(sizes: Sequence[TableSize], ranks: int, device: str, memory_per_rank: int) -> str:
    """The plan as text, one line per table, a heading that says why and a closing line that adds up."""
    lines = [
        f"{len(sizes)} tables, row-wise over {ranks} rank{'s' if ranks > 1 else ''} on {device}: "
        "rows are spread evenly by a mixed id, so no rank is a hot spot",
        f"{'table':<24}{'rows':>14}{'dim':>6}{'bytes/row':>11}{'in all':>12}{'per rank':>12}  features",
    ]
    for table in sizes:
        lines.append(
            f"{table.name:<24}{table.rows:>14,}{table.dim:>6}{table.row_bytes:>11}{size(table.bytes):>12}"
            f"{size(-(-table.bytes // ranks)):>12}  {', '.join(table.features)}"
        )
    total = sum(table.bytes for table in sizes)
    lines.append(f"in all {size(total)}, {size(-(-total // ranks))} per rank of {size(memory_per_rank)}")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes with a unit: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
