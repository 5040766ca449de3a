"""Write what the gates of a run say of its fields, at its end."""

from __future__ import annotations

from pathlib import Path

from tessera.ctr.selection.gates import FieldGates
from tessera.ctr.selection.result import PLACE, Importance, write_result

MEANINGS = {
    "none": "gates that are 1",
    "dropout": "1 - p, p the probability to drop the field that the run has learned",
    "lpfs": "the absolute value of the field's gate, which begins at 1",
    "autofield": "the probability to keep the field, learned on the valid split",
    "optfs": "the mean weight of the ids that rows have, 0 for those that are dropped, over about the last 100 steps",
    "dnis": "the mean mask over the columns of the table, which begins at 1",
}


def ranked_by(gates: FieldGates) -> list[Importance]:
    """Return the fields by their gates, most important first."""
    values = gates.importance().cpu().tolist()
    found = [Importance(group.features, value, None, None) for group, value in zip(gates.groups, values, strict=True)]
    return sorted(found, key=lambda one: -one.importance)


def write_gates(gates: FieldGates, run_dir: Path, step: int, which: str) -> Path:
    """Write importance/<method> of a run folder; return that folder. step, which: of the model that has these gates."""
    folder = run_dir / PLACE / gates.method
    about = {"method": gates.method, "meaning": MEANINGS[gates.method], "run": str(run_dir), "model": which}
    write_result(folder, about | {"step": step}, ranked_by(gates))
    return folder
