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


class Shown(NamedTuple):
    """What was found of a system: its lines, the seconds of one core that its fits took, how many of them could stop by
    themselves, and how many of these did not."""

    rows: Sequence[Row]
    seconds: float = 0.0
    stoppable: int = 0
    to_the_end: int = 0


def page(found: Mapping[System, Shown], head: str) -> str:
    """Return the whole page as markdown: `head`, then each system with its lines and what its fits took."""
    parts = [head]
    for system, shown in found.items():
        lines = [HEAD, "|---" * 6 + "|", *(_line(row) for row in shown.rows)]
        took = f"Fits: {shown.seconds / 60:.0f} min of one core." if shown.seconds else ""
        if shown.stoppable:
            took += f" Of {shown.stoppable} that could stop early, {shown.to_the_end} used all of their passes."
        parts.append(
            "\n\n".join(
                one for one in (f"## {system.title}", system.before, "\n".join(lines), system.after, took) if one
            )
        )
    seconds = sum(shown.seconds for shown in found.values())
    parts.append(f"All fits together: {seconds / 60:.0f} min of one core.")
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> str:
    cells = (row.claim, row.paper, row.where, row.ours, row.difference, WORDS.get(row.holds, row.holds))
    return f"| {' | '.join(cells)} |"
