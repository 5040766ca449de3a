"""Write the versions of a served model: whole from publications, what one publication changes, and changes merged.

A version has the graph of the export that the server was given, and in `weights.safetensors` the dense weights of its
publication, which take the place of the graph's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tessera.ctr.serving.changes import write_changes
from tessera.ctr.serving.conversion import Conversion
from tessera.ctr.serving.decay import Decay
from tessera.ctr.serving.description import FEATURES, TOWER, WEIGHTS, StoredProjection, StoredTable
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import SealedWriter
from tessera.ctr.serving.model_files import TablePlan, model_of, write_dense, write_static
from tessera.ctr.serving.saved_models import SavedModel, is_in, newest_rows, safetensors_of
from tessera.ctr.serving.scorer import CHANGES, Scorer
from tessera.ctr.serving.table_writer import TableWriter

Link = dict[str, str]  # what `latest` calls a publication: name and checksum


def name_of(link: Link, base: Scorer) -> str:
    """Return what answers call a publication that is served with the graph and the formats of an export."""
    return f"{link['name']}-{link['checksum']}-{base.manifest['checksum']}"


def write_whole(folder: Path, base: Scorer, link: Link, models: list[SavedModel]) -> None:
    """Write the export of a publication into an empty folder. models: newest first, down to a whole one.

    Raises ExportError: it is of another model than the base, or damaged.
    """
    writer = SealedWriter(folder)
    oov, projections = _write_dense(writer, base, models[0])
    tables = [write_table(writer, _plan(table, models[0]), models) for table in base.description.tables]
    described = replace(base.description, tables=tables, oov=oov, projections=projections)
    _finish_whole(writer, base, described.to_json(), _said(base, link, models[0].manifest["step"]))


def write_changed(folder: Path, base: Scorer, link: Link, before: Link, model: SavedModel) -> None:
    """Write what one publication changes of the one before it into an empty folder. All tables have rows by id.

    Raises ExportError: it is of another model than the base, or damaged.
    """
    writer = SealedWriter(folder)
    _write_dense(writer, base, model)
    for table in base.description.tables:
        write_changes(writer, _plan(table, model), model)
    writer.finish({**_said(base, link, model.manifest["step"]), "kind": CHANGES, "after": before})


def write_merged(folder: Path, base: Scorer, scorer: Scorer) -> None:
    """Write the export of a scorer that has changes over another export into an empty folder."""
    writer = SealedWriter(folder)
    for path in scorer.manifest["files"]:
        if not path.startswith("tables/"):
            _copied(writer, scorer.folder, path)
    tables = []
    for stored in base.description.tables:
        now = scorer.table(stored.name).table
        decay = Decay(now.decay_floats, now.decayed)
        table = TableWriter(stored.name, stored.features, stored.groups, decay=decay)
        for part in scorer.table(stored.name).parts():
            table.add(part)
        tables.append(table.finish(writer))
    described = replace(scorer.description, tables=tables)
    link: Link = scorer.manifest["published"]
    _finish_whole(writer, base, described.to_json(), _said(base, link, scorer.manifest["step"]))


def _said(base: Scorer, link: Link, step: int) -> dict[str, Any]:
    said = {key: value for key, value in base.manifest.items() if key not in ("files", "checksum")}
    return said | {"name": link["name"], "step": step, "published": link, "version": name_of(link, base)}


def _finish_whole(writer: SealedWriter, base: Scorer, described: dict[str, Any], said: dict[str, Any]) -> None:
    _copied(writer, base.folder, TOWER)
    writer.write(FEATURES, (json.dumps(described, indent=1) + "\n").encode())
    writer.finish(said)


def _copied(writer: SealedWriter, folder: Path, path: str) -> None:
    with writer.open(path) as target, open(folder / path, "rb") as source:
        shutil.copyfileobj(source, target)


def _write_dense(writer: SealedWriter, base: Scorer, newest: SavedModel) -> tuple[str | None, list[StoredProjection]]:
    """Write all but tables. Returns the file of the rows of unknown ids, and the projections."""
    config = newest.training.get("config")
    if not isinstance(config, dict) or model_of(config) != base.manifest["model"]:
        raise ExportError(
            f"{newest.place.name} was trained with another model or schema than the export; export the run anew"
        )
    writer.write(WEIGHTS, safetensors_of(dict(_weights(base, newest))))
    has_oov, projections = write_dense(writer, newest, [_plan(table, newest) for table in base.description.tables])
    oov = base.description.oov
    if has_oov != (oov is not None) or projections != base.description.projections:
        raise ExportError(f"{newest.place.name} has other rows of unknown ids or projections than the export")
    return oov, projections


def _weights(base: Scorer, newest: SavedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield a publication's value of each weight of the graph. Raises ExportError: it has none of that shape."""
    found = {name.replace("tower/", "tower.", 1): value for name, value in newest.tensors("tower/").items()}
    for name, value in base.weights().items():
        if name not in found or found[name].shape != value.shape:
            raise ExportError(f"{newest.place.name} holds no weight {name} {list(value.shape)}, which the export has")
        yield name, found[name].to(value.dtype)


def _plan(table: StoredTable, newest: SavedModel) -> TablePlan:
    """Return how a table's rows are stored in a publication and in the export."""
    if table.kind == "static":
        stored = tuple((group.name, group.dim, "fp32") for group in table.groups)
        return TablePlan(table.name, table.features, stored, table.groups, table.rows)
    described = newest.training.get("tables", {}).get(table.name)
    if not isinstance(described, dict):
        raise ExportError(f"{newest.place.name} does not describe table {table.name}")
    stored = tuple((str(name), int(dim), str(format)) for name, dim, format in described["groups"])
    return TablePlan(table.name, table.features, stored, table.groups, None)


def write_table(
    writer: SealedWriter, plan: TablePlan, models: list[SavedModel], ids: np.ndarray | None = None
) -> StoredTable:
    """Write a table of publications. models: newest first, down to a whole one. ids: sorted, those whose rows are
    written; None: all."""
    if plan.rows is not None:
        return write_static(writer, plan, models[0], None)
    table = TableWriter(plan.name, plan.features, plan.groups, decay=models[0].decay_of(plan.name))
    conversion = Conversion(plan.stored, plan.groups)
    for part in newest_rows(models, plan.name):
        chosen = part if ids is None else part.take(is_in(part.ids, ids))
        if len(chosen.ids):
            table.add(conversion.columns(chosen))
    return table.finish(writer)
