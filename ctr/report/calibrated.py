"""Show what calibration behind training changed: the metrics of each split before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.ctr.data.errors import DataError
from tessera.ctr.report.definitions import DEFINITIONS, number
from tessera.ctr.report.files import read_text
from tessera.ctr.report.plot import Table
from tessera.ctr.report.result import CALIBRATION

SHOWN = ("normalized_entropy", "calibration", "expected_calibration_error", "logloss", "auc")


@dataclass(frozen=True)
class Calibrated:
    """kind: platt | isotonic. said: what was fitted, on which split. before, after: split -> metric -> value."""

    kind: str
    said: str
    fitted_on: str
    before: dict[str, dict[str, float | None]]
    after: dict[str, dict[str, float | None]]

    def json(self) -> dict[str, Any]:
        return {"kind": self.kind, "fitted_on": self.fitted_on, "said": self.said,
                "splits": {s: {"before": self.before[s], "after": self.after[s]} for s in self.before}}  # fmt: skip

    def sentence(self) -> str:
        ties = " Rows may tie that did not before, which moves AUC a little." if self.kind == "isotonic" else ""
        return f"{self.kind.capitalize()}, fitted on {self.fitted_on}: {self.said}.{ties}"

    def table(self) -> Table:
        """Return a table with a row for each metric, and two columns for each split."""
        heads = [f"{split}, {when}" for split in self.before for when in ("before", "after")]
        titles = {definition.key: definition.title for definition in DEFINITIONS}
        rows = []
        for key in SHOWN:
            cells = [number(one[split].get(key)) for split in self.before for one in (self.before, self.after)]
            rows.append([titles[key], *cells])
        return Table(["metric", *heads], rows)


def read_calibrated(result: Path, splits: Mapping[str, Mapping[str, Any]]) -> Calibrated | None:
    """Return what the result of a run says of its calibration, None without one.

    splits: metrics of each split as they are.

    Raises DataError: the file is none of ours.
    """
    text = read_text(result / CALIBRATION)
    if not text:
        return None
    try:
        told = json.loads(text)
        before = {split: one for split, one in told["before"].items() if split in splits}
        after = {split: {key: splits[split][key] for key in SHOWN} for split in before}
        return Calibrated(told["kind"], told["said"], told["fitted_on"], before, after)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{result / CALIBRATION}: found {text[:80]!r}; expected what training wrote") from None
