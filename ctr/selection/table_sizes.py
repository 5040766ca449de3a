"""Write how wide tables must be, and what that saves: the end of a run with `selection.method=dnis`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.ctr.report.files import json_text
from tessera.ctr.selection.dim_masks import DimMasks
from tessera.distributed.atomic import write_text

SIZES = "sizes.json"
VERSION = 1


def overrides_of(gates: DimMasks, keep_above: float) -> list[str]:
    """Return the overrides that give each table its dim; one with the tower's needs none."""
    dims = gates.dims(keep_above)
    return [f"embedding.tables.{_quoted(name)}.dim={dim}" for name, dim in dims.items() if dim < gates.width]


def write_sizes(gates: DimMasks, folder: Path, rows: Mapping[str, int], keep_above: float, groups: int) -> None:
    """Write sizes.json: dims, overrides and bytes of values as float32.

    rows: of each table, over all ranks. groups: of embeddings that have the tower's dim.
    """
    dims = gates.dims(keep_above)
    tables: list[dict[str, Any]] = [
        {
            "table": name,
            "dim": dims[name],
            "masks": [round(one, 4) for one in masks],
            "rows": rows.get(name, 0),
            "bytes_before": 4 * groups * gates.width * rows.get(name, 0),
            "bytes": 4 * groups * dims[name] * rows.get(name, 0),
        }
        for name, masks in zip(gates.tables, gates.learned.tolist(), strict=True)
    ]
    told: dict[str, Any] = {"version": VERSION, "dim_before": gates.width, "keep_above": keep_above}
    for key in ("bytes_before", "bytes"):
        told[key] = sum(one[key] for one in tables)
    told |= {"overrides": overrides_of(gates, keep_above), "tables": tables}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SIZES, json_text(told) + "\n")


def _quoted(name: str) -> str:
    """Return a table's name as a command line has it."""
    return json.dumps(name, ensure_ascii=False) if "=" in name else name
