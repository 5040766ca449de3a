"""Bring an export up to date with what a run over days publishes: whole models, changes, and rollbacks.

Each publication becomes an export of its own beside the one that is served, whole and checked before it takes its name
by one rename; then it is served. So a kill at any moment leaves exports that are whole, and a failed update leaves the
one that is served. An export that is made of changes is, file by file of its tables, the one that would be made anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq
import torch

from tessera.ctr.serving.conversion import Conversion
from tessera.ctr.serving.description import FEATURES, FORMAT, TOWER, StoredTable
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import MANIFEST, Place, SealedWriter, read_manifest, sync_folder
from tessera.ctr.serving.model_files import TablePlan, model_of, save_graph, write_dense, write_static
from tessera.ctr.serving.saved_models import Publications, SavedModel, is_in, newest_rows
from tessera.ctr.serving.scorer import GOLDEN, PREDICTION, Scorer
from tessera.ctr.serving.table_writer import TableWriter

PARTIAL = ".partial-"  # begins names of folders that nobody takes for an export
LOCK = ".lock"
KEPT = 2  # versions that stay on the disk, the served one among them
RAW_ROWS = 1 << 16  # of the served tables that are copied at once


class Versions:
    """The exports made of publications, in one folder that belongs to one server.

    base: the export that the server was given: its graph and its columns are those of all versions.
    """

    def __init__(self, base: Path, published: str, folder: Path) -> None:
        self.base, self.folder = Path(os.path.abspath(base)), Path(os.path.abspath(folder))
        self.publications = Publications(published)
        self._base = read_manifest(Place(self.base), FORMAT)
        self._lock: IO[str] | None = None

    def begin(self) -> Scorer:
        """Remove what a killed server left half written, and open the version that is furthest along the chain that
        `latest` names; the base if there is none.

        Raises ExportError: the base cannot be read, or another server uses the folder. OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold()
        for path in self.folder.iterdir():
            if path.name.startswith(PARTIAL):
                shutil.rmtree(path, ignore_errors=True)
        try:
            links = self.publications.latest()
        except ExportError:
            links = []
        for link in reversed(links):
            if link == self._base["published"]:
                break
            try:
                if self._path(link).is_dir():
                    return Scorer(self._path(link), check=True)
            except ExportError:  # damaged on the disk since; it is made again
                shutil.rmtree(self._path(link), ignore_errors=True)
        return Scorer(self.base)

    def _path(self, link: dict[str, str]) -> Path:
        """Return the folder of a version: of this publication, and of this base, whose graph and formats it has."""
        return self.folder / f"{link['name']}-{link['checksum']}-{self._base['checksum']}"

    def _hold(self) -> None:
        """Keep the folder for this process, which may ask again. Raises ExportError: another one has it."""
        if self._lock is None:
            lock = open(self.folder / LOCK, "w")  # noqa: SIM115, it is held as long as the server lives
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                raise ExportError(
                    f"{self.folder} is in use by another server; expected a folder of its own for each (--versions)"
                ) from None
            self._lock = lock

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def update(self, current: Scorer) -> Scorer | None:
        """Return a scorer of what `latest` names; None if `current` is it.

        Raises ExportError: what is published is missing, damaged or of another model; OSError: it cannot be written.
            What is served is untouched.
        """
        links = self.publications.latest()
        target, had = links[-1], current.manifest["published"]
        if had == target:
            return None
        path = self._path(target)
        if not path.is_dir():
            place = links.index(had) + 1 if had in links else 0
            models = self.publications.open(links[place:])
            self._make(path, target, models, current if place else None)
        scorer = Scorer(path)
        self._check(scorer)
        self._forget({path, current.folder})
        return scorer

    def _make(self, path: Path, link: dict[str, str], models: list[SavedModel], before: Scorer | None) -> None:
        """Write the export of a publication under its name. before: the export that the changes of `models` follow;
        None: the oldest of the models is whole."""
        partial = self.folder / f"{PARTIAL}{path.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write_version(partial, self.base, link, models, before)
            os.rename(partial, path)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _check(self, scorer: Scorer) -> None:
        """Raise ExportError for a model that scores golden rows as no probability."""
        golden = self.base / GOLDEN
        if golden.exists():
            found = scorer(pq.read_table(golden, partitioning=None).drop_columns([PREDICTION]))
            if not np.isfinite(found).all():
                raise ExportError(f"{scorer.folder.name} scores golden rows as {found[~np.isfinite(found)][0]}")

    def _forget(self, used: set[Path]) -> None:
        """Remove versions that are not used any more but for the newest; what is open stays readable."""
        others = [path for path in self.folder.iterdir() if path not in used and (path / MANIFEST).exists()]
        others.sort(key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
        for path in others[: max(0, len(others) + len(used) - KEPT)]:
            shutil.rmtree(path, ignore_errors=True)


def write_version(
    folder: Path, base: Path, link: dict[str, str], models: list[SavedModel], before: Scorer | None
) -> None:
    """Write the export of a publication into an empty folder.

    models: publications, newest first. before: as `Versions._make` has it.

    Raises ExportError: it is of another model than the base, or damaged.
    """
    like = before or Scorer(base)
    newest, writer = models[0], SealedWriter(folder)
    _same_model(newest, like)
    write_tower(writer, base / TOWER, newest)
    plans = [_plan(table, newest) for table in like.description.tables]
    has_oov, projections = write_dense(writer, newest, plans)
    tables = [_write_table(writer, plan, models, before) for plan in plans]
    oov = "dense/oov.npy" if has_oov else None
    described = replace(like.description, tables=tables, oov=oov, projections=projections)
    writer.write(FEATURES, (json.dumps(described.to_json(), indent=1) + "\n").encode())
    said = {key: value for key, value in like.manifest.items() if key not in ("files", "checksum")}
    writer.finish(said | {"name": link["name"], "step": newest.manifest["step"], "published": link})


def _same_model(newest: SavedModel, like: Scorer) -> None:
    config = newest.training.get("config")
    if not isinstance(config, dict) or model_of(config) != like.manifest["model"]:
        raise ExportError(
            f"{newest.place.name} was trained with another model or schema than the export; export the run anew"
        )


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


def write_tower(writer: SealedWriter, graph: Path, newest: SavedModel) -> None:
    """Write a graph with the dense weights of a publication.

    Raises ExportError: it has other weights than the graph.
    """
    program = torch.export.load(graph)
    found = {name.replace("tower/", "tower.", 1): value for name, value in newest.tensors("tower/").items()}
    state: dict[str, Any] = program.state_dict
    for name, value in state.items():
        if name not in found or found[name].shape != value.shape:
            raise ExportError(f"{newest.place.name} holds no weight {name} {list(value.shape)}, which the export has")
        made = found[name].to(value.dtype)
        state[name] = torch.nn.Parameter(made, requires_grad=False) if isinstance(value, torch.nn.Parameter) else made
    save_graph(program, writer.folder / TOWER)
    writer.seal_file(TOWER)


def _write_table(writer: SealedWriter, plan: TablePlan, models: list[SavedModel], before: Scorer | None) -> StoredTable:
    if plan.rows is not None:
        return write_static(writer, plan, models[0], None)
    hidden: list[np.ndarray] = []
    table = TableWriter(plan.name, plan.features, plan.groups)
    conversion = Conversion(plan.stored, plan.groups)
    for part in newest_rows(models, plan.name, hidden if before else None):
        table.add(conversion.columns(part))
    if before is not None:
        old = before.table(plan.name)
        for begin in range(0, old.table.rows, RAW_ROWS):
            columns = old.raw(begin, min(begin + RAW_ROWS, old.table.rows))
            kept = ~is_in(columns[0], hidden[0])
            table.add([column[kept] for column in columns])
    return table.finish(writer)
