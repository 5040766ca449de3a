"""The result of a ranking of fields: one line for each, and the two files that say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tessera.ctr.report.files import json_text
from tessera.ctr.report.importance_page import importance_page
from tessera.distributed.atomic import write_text

PLACE, IMPORTANCE, PAGE = "importance", "importance.json", "importance.html"
VERSION = 1


@dataclass(frozen=True)
class Importance:
    """One line of the ranking. low, high: the bounds of a 95 % interval, None where one number does not give one;
    metrics: how much each metric gets worse."""

    features: tuple[str, ...]
    importance: float
    low: float | None
    high: float | None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " + ".join(self.features)


def write_result(folder: Path, about: dict[str, Any], found: Sequence[Importance]) -> None:
    """Write importance.json and its page into a folder, which is made if it is not there.

    about: what stands beside the fields, "method" and "meaning" at least. found: most important first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = [{"rank": place, "name": one.name, **asdict(one)} for place, one in enumerate(found, 1)]
    told = {"version": VERSION, **about, "fields": fields}
    write_text(folder / IMPORTANCE, json_text(told) + "\n")
    write_text(folder / PAGE, importance_page(told, IMPORTANCE))
