"""Score rows with an export: `Scorer.load("exports/mine")(rows)`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.ctr.serving.changes import ChangedTable
from tessera.ctr.serving.description import FEATURES, FORMAT, TOWER, WEIGHTS, Description, read_description
from tessera.ctr.serving.embeddings import Embeddings
from tessera.ctr.serving.error_memory import base_of
from tessera.ctr.serving.errors import ExportError, RowError
from tessera.ctr.serving.events import EventInputs, passes, tensors_of
from tessera.ctr.serving.files import Place, read_manifest
from tessera.ctr.serving.graph import AnyGraph, load_graph
from tessera.ctr.serving.rows import RowDecoder, Rows
from tessera.ctr.serving.saved_models import read_safetensors
from tessera.ctr.serving.table_files import IDS, STARTS, TableFiles

BATCH_ROWS = 8192  # rows that are scored at once: what they look up is held in memory
CHANGES = "changes"  # kind of folders that hold changes
GOLDEN, PREDICTION = "golden.parquet", "golden_prediction"


@dataclass(frozen=True)
class Inputs:
    """What the tower reads of some rows: numeric float32 [n, numeric fields], groups float32 [n, id fields, dim], and
    the events of each group of sequences."""

    numeric: Tensor
    groups: list[Tensor]
    events: list[EventInputs] = field(default_factory=list)


class Scorer:
    """An export that is open. Any number of threads may score at the same time.

    Attributes:
        labels: what is predicted, in the order of the columns of a result.
        version: name and checksum of the model; the same in every answer of one model.
        manifest: what the export says of itself.
        folders: the export, then those of the changes over it.
    """

    def __init__(self, folder: str | Path, *, check: bool = False, graph: Scorer | None = None) -> None:
        """Open the export in a folder. Tables are mapped into memory and not read.

        check: read every file and compare its checksum first; without it the small ones alone are. graph: a scorer of
        the same graph, to copy where the export has weights beside it.

        Raises ExportError: it is no export of this version, or a file is missing or was changed.
        """
        if "://" in str(folder):
            raise ExportError(f"{folder}: tables are mapped into memory; expected a folder on this machine")
        self.folder = Path(os.path.abspath(os.path.expanduser(folder)))
        self.folders = [self.folder]
        place = Place(self.folder)
        self.manifest = checked_manifest(place, lambda path: check or not path.startswith("tables/"))
        if self.manifest.get("kind") == CHANGES:
            raise ExportError(f"{self.folder} holds changes of an export, which a server lays over it; expected one")
        if self.manifest.get("kind") != "export":
            raise ExportError(f"{self.folder} is of kind {self.manifest.get('kind')!r}; expected an export")
        self.version = version_of(self.manifest)
        description = read_description(place)
        self.description = description
        unlisted = [path for path in files_of(description) if path not in self.manifest["files"]]
        if unlisted:
            raise ExportError(f"{self.folder} is damaged: its manifest does not list {unlisted[0]}")
        self.labels = [label.name for label in description.labels]
        self._numbers = [place for place, label in enumerate(description.labels) if label.is_number]
        schema = description.schema()
        self._decoder = RowDecoder(schema)
        self._scalars, self._ids = list(schema.scalar_names), list(schema.pooled_names)
        self._width = len(schema.numeric_names)
        sequences = [name for name in schema.id_names if name not in self._ids]
        self._embeddings = Embeddings(str(self.folder), description, self._ids, sequences, weighted=schema.weighted)
        has_weights = WEIGHTS in self.manifest["files"]
        tower: AnyGraph = graph._tower if graph and has_weights else load_graph(self.folder / TOWER)
        self._tower: AnyGraph = reweighted(tower, self.folder) if has_weights else tower

    @classmethod
    def load(cls, folder: str | Path, *, check: bool = False) -> Scorer:
        """Open the export in a folder; as the constructor."""
        return cls(folder, check=check)

    def with_changes(self, folder: Path) -> Scorer:
        """Return the scorer after the changes of one publication; this one stays as it is.

        Raises ExportError: they are damaged, or none that follow this model; OSError: there is no space.
        """
        changed = copy.copy(self)
        vars(changed).pop("base", None)  # of the weights before
        changed.manifest = checked_manifest(Place(folder), lambda path: True)
        if changed.manifest.get("kind") != CHANGES or changed.manifest.get("after") != self.manifest["published"]:
            raise ExportError(f"{folder} holds no changes that follow {self.version}")
        changed.folder, changed.folders = folder, [*self.folders, folder]
        changed.version = version_of(changed.manifest)
        changed._embeddings = self._embeddings.with_changes(str(folder), self.description, str(folder.parent))
        changed._tower = reweighted(self._tower, folder)
        return changed

    @property
    def rows(self) -> int:
        """Rows of all tables of the export, without changes over it."""
        return sum(table.rows for table in self.description.tables)

    @property
    def changed(self) -> int:
        """Ids whose rows were written or given up by changes."""
        return sum(table.changed for table in self._embeddings.tables)

    def weights(self) -> dict[str, Tensor]:
        """Return the dense weights of the graph by name."""
        return dict(self._tower.state_dict())

    @property
    def columns(self) -> list[str]:
        """Columns that rows must have."""
        return list(self._decoder.columns)

    def __call__(self, rows: Any) -> np.ndarray:
        """Return the probability of each row, float32 [n], or [n, labels] where the model answers several labels; of a
        label that is a number, the number.

        rows: an Arrow table or batch, a pandas data frame, a list of dicts, or one dict. Columns that the model does
            not read may be there.

        Raises RowError: a column is missing, or a value is none that training would take.
        """
        table = self._decoder.table(rows)
        begins = range(0, max(1, table.num_rows), BATCH_ROWS)
        parts = (self._inputs(self._decoder.decode(table.slice(begin, BATCH_ROWS), begin)) for begin in begins)
        return np.concatenate([self.predict([part])[0] for part in parts])

    def rank(self, user: Any, candidates: Any) -> np.ndarray:
        """Return the probability of each candidate for one user, as `__call__` does for rows of both.

        user: one row with the columns of its features, which are looked up once. candidates: rows with all others;
            where both have a column, the candidates' counts.

        Raises RowError: as `__call__`, or there is not one user.
        """
        return self.predict([self.prepare_ranked(user, candidates)])[0]

    def prepare(self, rows: Any) -> Inputs:
        """Decode rows and look up their ids: what `predict` takes. Raises RowError."""
        return self._inputs(self._decoder.decode(self._decoder.table(rows)))

    def prepare_ranked(self, user: Any, candidates: Any) -> Inputs:
        """Do the same for candidates of one user. Raises RowError."""
        if isinstance(candidates, Sequence) and not len(candidates):
            dims = list(self.description.groups.values())
            empty = [torch.zeros(0, len(self._ids), dim) for dim in dims]
            events = [EventInputs.empty(group, dims) for group in self._decoder.schema.sequences.values()]
            return Inputs(torch.zeros(0, self._width), empty, events)
        theirs = self._decoder.table(candidates, some=True)
        mine = self._decoder.table(user, some=True)
        if not mine.column_names:
            return self.prepare(candidates)
        if mine.num_rows != 1:
            raise RowError(f"found {mine.num_rows} rows of users; expected one")
        mine = mine.drop_columns([name for name in mine.column_names if name in theirs.column_names])
        sides = [set(mine.column_names), set(theirs.column_names)]
        missing = [name for name in self._decoder.columns if name not in sides[0] | sides[1]]
        if missing:
            raise RowError(f"column {missing[0]!r} is neither the user's nor the candidates'")
        for feature in self._decoder.schema.stored:
            read = self._decoder.read_by(feature)
            if not any(read <= side for side in sides):
                raise RowError(f"columns {' and '.join(map(repr, sorted(read)))} must be on the same side")
        return self._inputs(self._decoder.decode(theirs), self._decoder.decode(mine))

    def predict(self, inputs: Sequence[Inputs]) -> list[np.ndarray]:
        """Return the answers for each of some inputs, in one pass of the model."""
        return [answers for answers, _ in self.predict_with_hidden(inputs)]

    def predict_with_hidden(self, inputs: Sequence[Inputs]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the answers for each of some inputs, and what the last layer reads of each row, float32 [n, hidden];
        of an export without, [n, 0]."""
        rows = [one.numeric.shape[0] for one in inputs]
        if not sum(rows):
            shape = (0,) if len(self.labels) == 1 else (0, len(self.labels))
            nothing = np.zeros(shape, np.float32), np.zeros((0, self.description.hidden or 0), np.float32)
            return [nothing for _ in inputs]
        with torch.no_grad():
            numeric = _joined([one.numeric for one in inputs])
            groups = [_joined(list(group)) for group in zip(*(one.groups for one in inputs), strict=True)]
            events = list(zip(*(one.events for one in inputs), strict=True))
            found = [self._tower(*part) for part in passes(numeric, groups, events, BATCH_ROWS)]
            if self.description.hidden is None:
                logits, hidden = _joined(found), torch.zeros(numeric.shape[0], 0)
            else:
                logits, hidden = (_joined(list(parts)) for parts in zip(*found, strict=True))
            answers = answers_of(logits, self._numbers).numpy()
        ends = np.cumsum(rows)[:-1]
        return list(zip(np.split(answers, ends), np.split(hidden.numpy(), ends), strict=True))

    @cached_property
    def base(self) -> str:
        """Name the dense weights: an error memory of another one is of no use."""
        return base_of(self._tower.state_dict())

    def check_golden(self) -> float:
        """Return the largest difference, as `differences` counts it, between the scores of the export's golden rows and
        those that training's own evaluation gave; 0 where it has none.

        Raises ExportError: the rows cannot be read.
        """
        import pyarrow.parquet as pq

        if GOLDEN not in self.manifest["files"]:
            return 0.0
        table = pq.read_table(self.folder / GOLDEN, partitioning=None)
        expected = np.array(table[PREDICTION].to_pylist(), np.float32)
        return float(differences(self(table), expected).max(initial=0.0))

    def table(self, name: str) -> TableFiles | ChangedTable:
        """Return a table, open."""
        return next(table for table in self._embeddings.tables if table.table.name == name)

    def _inputs(self, rows: Rows, user: Rows | None = None) -> Inputs:
        """Look up the ids of rows, and of what they do not have those of one user, once for all of them."""
        numeric = np.empty((rows.count, self._width), np.float32)
        for place, name in enumerate(self._scalars):
            side = rows if name in rows.numeric else user
            assert side is not None
            numeric[:, place] = side.numeric[name]
        first = len(self._scalars)
        for feature in self._decoder.schema.vectors:
            side = rows if feature.name in rows.vectors else user
            assert side is not None
            found = side.vectors[feature.name]
            numeric[:, first : first + found.shape[1]] = found
            first += found.shape[1]
        bags, once = rows.bags, None
        if user is not None:
            bags = bags | self._decoder.crossed(rows, user)
            once = {name: user.bags[name] for name in self._ids if name not in bags}
        with torch.no_grad():
            groups = self._embeddings.pooled(bags, rows.count, once)
        return Inputs(torch.from_numpy(numeric), list(groups.values()), self._events(rows, user))

    def _events(self, rows: Rows, user: Rows | None) -> list[EventInputs]:
        """Return the events of each row; those of the user are looked up once and stand in every row."""
        found = []
        for group in self._decoder.schema.sequences.values():
            if group[0].name in rows.bags:
                found.append(tensors_of(group, rows.bags, self._embeddings))
            else:
                assert user is not None
                found.append(tensors_of(group, user.bags, self._embeddings, rows.count))
        return found


def differences(scores: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return how far each score lies from the expected one: of those above 1, as labels that are numbers may have, as a
    share of them, for their last bits are as large."""
    apart: np.ndarray = np.abs(scores - expected) / np.maximum(np.abs(expected), 1)
    return apart


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def answers_of(logits: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return probabilities of logits [n] or [n, labels]; labels that are numbers, by their places, stay as they are."""
    answers = torch.sigmoid(logits)
    if not numbers:
        return answers
    if logits.dim() == 1:
        return logits
    answers[:, list(numbers)] = logits[:, list(numbers)]
    return answers


def version_of(manifest: dict[str, Any]) -> str:
    """Return what answers call a model."""
    return str(manifest.get("version") or f"{manifest['name']}-{manifest['checksum']}")


def checked_manifest(place: Place, chosen: Callable[[str], bool]) -> dict[str, Any]:
    """Return the manifest of a folder. chosen: which files are compared with it; of others the size alone.

    Raises ExportError: it is none of this version, or a file is missing or was changed.
    """
    manifest = read_manifest(place, FORMAT)
    for path, sealed in manifest["files"].items():
        problem = (place.problem if chosen(path) else place.size_problem)(path, sealed)
        if problem:
            raise ExportError(f"{place.name} is damaged: {problem}")
    return manifest


def files_of(description: Description) -> list[str]:
    """Return the files that a scorer reads of an export, which its manifest must list."""
    found = [FEATURES, TOWER, *([description.oov] if description.oov else [])]
    found += [projection.file for projection in description.projections]
    for table in description.tables:
        found += [path for group in table.groups for path in (group.values, group.scales) if path is not None]
        if table.kind != "static":
            found += [f"{table.folder}/{name}" for name in (STARTS, IDS)]
    return found


def reweighted(tower: AnyGraph, folder: Path) -> AnyGraph:
    """Return a tower with the weights in a folder. Raises ExportError: they are of another graph."""
    try:
        return tower.with_weights(read_safetensors((folder / WEIGHTS).read_bytes(), f"{folder}/{WEIGHTS}"))
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{folder}/{WEIGHTS} does not hold the weights of the graph: {reason}") from None
