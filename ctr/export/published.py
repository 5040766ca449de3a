"""After a day is published: an export of the publication scores golden rows as the live model does, before anybody is
told to serve it.

The export holds the rows of the golden ids alone, so it is small however large the model; the publication's files are
read once, by the first rank.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config
from tessera.ctr.data.listing import Listing
from tessera.ctr.data.padding import padded
from tessera.ctr.data.schema import Schema
from tessera.ctr.export.describe import describe, plans_of
from tessera.ctr.export.export import GOLDEN_BATCH, bound_of, ids_by_table
from tessera.ctr.export.golden import golden_rows
from tessera.ctr.export.source import open_source
from tessera.ctr.export.tower import ServedTower, graph_of
from tessera.ctr.network import build_tower, fields_of
from tessera.ctr.runs.score_rows import row_reader
from tessera.ctr.serving.description import FEATURES, FORMAT, TOWER
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import SealedWriter
from tessera.ctr.serving.model_files import save_graph, write_dense
from tessera.ctr.serving.saved_models import SavedModel
from tessera.ctr.serving.scorer import Scorer, answers_of, differences
from tessera.ctr.serving.version_files import write_table
from tessera.ctr.train.step_pipeline import to_device
from tessera.distributed.atomic import write_text
from tessera.distributed.collectives import on_first_rank
from tessera.distributed.rank import Process

RESULT = "export.json"  # in the folder of a day
EQUAL_GPU, EQUAL_TF32 = 1e-4, 1e-2  # of a model that evaluates on a GPU, whose sums have another order


class PublishedCheck:
    """Compares exports of publications with the live model. Every rank calls it.

    model: the live one, sharded.
    """

    def __init__(self, config: Config, schema: Schema, model: DistributedModelParallel, process: Process) -> None:
        self._config, self._schema, self._model, self._process = config, schema, model, process
        size = max(1, config.trainer.batch_size // process.world_size)
        self._scored = copy.deepcopy(config)
        self._scored.trainer.batch_size = min(size, GOLDEN_BATCH)

    def check(self, location: str, name: str, folder: Path, paths: Sequence[str | Listing]) -> None:
        """Write what came out to `export.json` in a folder.

        location: of the publication `name`. paths: rows like those that it was trained on.

        Raises ExportError, on all ranks: the export scores otherwise than the live model, or the publication cannot be
        read; one line.
        """
        self._process.stage = f"checking the export of {name}"
        golden = on_first_rank(self._process, lambda: golden_rows(self._config, self._schema, paths))
        expected = self._evaluated(golden)
        on_first_rank(self._process, lambda: self._compare(location, name, folder, golden, expected))

    @torch.no_grad()
    def _evaluated(self, golden: pa.Table) -> np.ndarray:
        """Return what the live model says, as evaluation asks it. Every rank asks for the same rows."""
        model, size = self._model, self._scored.trainer.batch_size
        was_training = model.training
        model.eval()
        numbers = [place for place, task in enumerate(self._schema.tasks) if task.is_number]
        found: dict[int, np.ndarray] = {}
        with tempfile.TemporaryDirectory() as mine:
            pq.write_table(golden, Path(mine) / "golden.parquet")
            for batch in row_reader(self._scored, [str(Path(mine) / "golden.parquet")]).epoch(0):
                assert batch.number is not None
                rows = batch.number[: batch.rows].tolist()
                logits, _ = model(to_device(padded(batch, size), self._process.device))
                found |= dict(zip(rows, answers_of(logits, numbers).cpu().numpy(), strict=False))
        model.train(was_training)
        return np.array([found[number] for number in range(golden.num_rows)], np.float32)

    def _compare(self, location: str, name: str, folder: Path, golden: pa.Table, expected: np.ndarray) -> None:
        source = open_source(location, name)
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as mine:
            self._write(Path(mine), source.models, golden)
            scores = Scorer(mine)(golden)
        away, bound = differences(scores, expected), self._bound()
        difference = float(np.nan_to_num(away, nan=np.inf).max(initial=0.0))
        said: dict[str, Any] = {"publication": source.models[0].manifest["checksum"], "rows": golden.num_rows}
        said |= {"difference": difference if np.isfinite(difference) else None, "bound": bound}
        problem = None
        if not difference <= bound:
            row = int(np.nan_to_num(away, nan=np.inf).reshape(len(away), -1).max(1).argmax())
            problem = (
                f"the export of {name} scores golden row {row} as {scores[row]}, evaluation as {expected[row]}: "
                f"{difference:.1e} apart, expected at most {bound:.0e}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RESULT, json.dumps(said | {"problem": problem}, indent=1) + "\n")
        if problem is not None:
            raise ExportError(
                f"{problem}; latest does not name it. daily.rollback_to goes back to a day before, "
                "export.published=false publishes it all the same"
            )

    def _bound(self) -> float:
        trainer = self._config.trainer
        if trainer.amp or self._process.device.type == "cpu":
            return bound_of(self._config, self._schema)
        return EQUAL_TF32 if trainer.tf32 else EQUAL_GPU

    def _write(self, folder: Path, models: list[SavedModel], golden: pa.Table) -> None:
        """Write an export with the rows of the golden ids alone."""
        config, schema, writer, newest = self._config, self._schema, SealedWriter(folder), models[0]
        tower = build_tower(config, schema)
        tower.load_state_dict({name.removeprefix("tower/"): value for name, value in newest.tensors("tower/").items()})
        served = ServedTower(tower, amp=config.trainer.amp, sequences=fields_of(config, schema).sequences)
        save_graph(graph_of(served, len(schema.numeric_names), len(schema.pooled_names)), folder / TOWER)
        writer.seal_file(TOWER)
        dims = dict(tower.embedding_dims)
        plans = plans_of(self._model.module.tables, schema, dims, None)
        dense, wanted = write_dense(writer, newest, plans), ids_by_table(golden, schema)
        tables = [write_table(writer, plan, models, wanted[plan.name]) for plan in plans]
        described = describe(config, schema, dims, tables, dense)
        writer.write(FEATURES, json.dumps(described.to_json()).encode())
        writer.finish({"format": FORMAT, "kind": "export", "name": "golden", "step": 0, "published": None, "model": {}})


def problem_of(folder: Path, checksum: str) -> str | None:
    """Return what was wrong with the export of a day's publication; None if nothing was, or nobody has looked.

    folder: of the day. checksum: of the publication.
    """
    try:
        found = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return found.get("problem") if isinstance(found, dict) and found.get("publication") == checksum else None
