"""docs/claims.md: one table per system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tessera.scripts.bench.claims.bench import Row

HEAD = "| claim | paper | on | ours, AUC | difference | |"
#: What `verdict` says, as the page has it.
WORDS = {
    "holds": "**holds**",
    "in every seed": "in every seed, but not the whole interval",
    "on the mean": "on the mean, but the interval goes beyond -0.001",
    "not told apart": "not told apart here",
    "the other way": "**does not hold here**: the other way",
    "does not hold": "**does not hold here**",
}


class System(NamedTuple):
    """A system of the page: its title, what is said before its table and after it."""

    title: str
    before: str
    after: str = ""


def page(found: Mapping[System, tuple[Sequence[Row], float]], head: str) -> str:
    """Return the whole page as markdown: `head`, then each system with its lines and seconds of one core."""
    parts = [head]
    for system, (rows, seconds) in found.items():
        lines = [HEAD, "|---" * 6 + "|", *(_line(row) for row in rows)]
        took = f"Fits: {seconds / 60:.0f} min of one core." if seconds else ""
        parts.append(
            "\n\n".join(
                one for one in (f"## {system.title}", system.before, "\n".join(lines), system.after, took) if one
            )
        )
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> str:
    cells = (row.claim, row.paper, row.where, row.ours, row.difference, WORDS.get(row.holds, row.holds))
    return f"| {' | '.join(cells)} |"
