"""Write the parts of an export that come from a saved model: its graph, its dense rows, its static tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from tessera.ctr.serving.conversion import Conversion, Note
from tessera.ctr.serving.description import StoredGroup, StoredProjection, StoredTable
from tessera.ctr.serving.files import SealedWriter
from tessera.ctr.serving.saved_models import SavedModel
from tessera.ctr.serving.table_writer import folder_of, write_array, write_header

OOV = "dense/oov.npy"
Groups = tuple[tuple[str, int, str], ...]  # name, dim, format


@dataclass(frozen=True)
class TablePlan:
    """A table that is to be exported. stored: its groups as training has them; groups: as the export will; rows: of a
    static table, None where rows come by id."""

    name: str
    features: tuple[str, ...]
    stored: Groups
    groups: tuple[StoredGroup, ...]
    rows: int | None


def save_graph(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write torch.export's archive: a zip of JSON and raw tensors, nothing of it pickled."""
    program.example_inputs = None  # would be pickled
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names folders of the machine that trained the model
    torch.export.save(program, path)


def model_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return of a configuration what decides which graph and which columns a model has: what exports and publications
    must have in common."""
    schema = config["schema"] if "schema" in config else config["data"]["schema"]
    return json.loads(json.dumps({"model": config["model"], "numeric": config["numeric"], "schema": schema}))


def write_dense(
    writer: SealedWriter, model: SavedModel, plans: Sequence[TablePlan]
) -> tuple[bool, list[StoredProjection]]:
    """Write what tables have besides rows. Returns whether ids without a row have one to read, and the projections."""
    found = model.tensors("tables/others") | model.tensors("tables/projections.")
    projections = []
    named = {f"{plan.name}_{group.name}": (plan.name, group.name) for plan in plans for group in plan.groups}
    for name, values in sorted(found.items()):
        if name == "tables/others":
            write_array(writer, OOV, values.float().numpy())
            continue
        stem = name.removeprefix("tables/projections.").removesuffix(".weight")
        path = f"dense/projection.{quote(stem, safe='')}.npy"
        projections.append(StoredProjection(*named[stem], path))
        write_array(writer, path, values.float().numpy())
    return "tables/others" in found, projections


def write_static(writer: SealedWriter, plan: TablePlan, model: SavedModel, note: Note | None) -> StoredTable:
    """Write a table whose rows are all there, piece by piece."""
    assert plan.rows is not None
    for number, group in enumerate(plan.groups):
        conversion = Conversion([plan.stored[number]], [group], note)
        name = f"tables/embedding_bags.{plan.name}_{group.name}.weight"
        pieces = sorted(model.pieces(name), key=lambda piece: piece[1])
        columns = [conversion.floats(values[:, : group.dim].float().contiguous(), group) for *_, values in pieces]
        for place, path in enumerate([group.values, *([group.scales] if group.scales else [])]):
            parts = [one[place] for one in columns]
            with writer.open(path) as stream:
                write_header(stream, parts[0].dtype, (plan.rows, *parts[0].shape[1:]))
                for part in parts:
                    stream.write(np.ascontiguousarray(part))
    return StoredTable(plan.name, plan.features, "static", folder_of(plan.name), plan.rows, 0, plan.groups)
