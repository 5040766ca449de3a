"""Make one folder of a trained model that needs nothing of the system that trained it (docs/export.md).

Rows go from saved files to the export's without being in memory all at once. The scores of golden rows come from a
second copy of the model, built as evaluation builds it, which holds the rows of their ids alone.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config
from tessera.ctr.data.config import schema_of
from tessera.ctr.data.schema import Schema
from tessera.ctr.export.describe import describe, plans_of
from tessera.ctr.export.golden import golden_rows, scores_of
from tessera.ctr.export.source import Source
from tessera.ctr.export.tower import ServedTower, graph_of
from tessera.ctr.network import build_model, fields_of
from tessera.ctr.output_folders import replacing_on_ranks
from tessera.ctr.runs.error_memory import width_of
from tessera.ctr.selection.config import refuse_gates
from tessera.ctr.serving.conversion import Conversion
from tessera.ctr.serving.description import FEATURES, FORMAT, TOWER, StoredTable
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.files import SealedWriter
from tessera.ctr.serving.model_files import TablePlan, model_of, save_graph, write_dense, write_static
from tessera.ctr.serving.rows import RowDecoder
from tessera.ctr.serving.saved_models import RowPart, SavedModel, is_in, newest_rows
from tessera.ctr.serving.scorer import GOLDEN, PREDICTION, Scorer
from tessera.ctr.serving.table_writer import TableWriter
from tessera.distributed.rank import Process
from tessera.distributed.tables import owned_tables
from tessera.embedding.convert import ConversionError
from tessera.embedding.errors import ConfigError
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.set_table import OwnedTable

COMMAND = "export.py"
EXAMPLE = "example.json"  # a body for `tessera serve`
EQUAL, EQUAL_AMP = 1e-6, 2e-2  # of `differences`, where no row is rounded anew
EQUAL_NUMBERS = 1e-5  # where labels are numbers: sums in which large products cancel out, and no sigmoid behind them
GOLDEN_BATCH = 256


@dataclass(frozen=True)
class Options:
    """format: of rows that become smaller by it, None: as stored. compiled: an AOTInductor package too. onnx: a graph
    of ONNX too. hidden: the graph answers also what its last layer reads, which an error memory needs."""

    format: str | None = None
    compiled: bool = False
    onnx: bool = False
    hidden: bool = False


@dataclass
class Exported:
    """What was made. errors: of each table and group that was rounded. difference: largest one between the scores of
    golden rows and evaluation's, as `differences` counts it."""

    folder: Path
    name: str
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    golden: int = 0
    difference: float = 0.0
    errors: dict[tuple[str, str], ConversionError] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return what the command prints."""
        rounded = [f"{table}.{group}: {error}" for (table, group), error in sorted(self.errors.items())]
        size = f"{self.rows:,} rows, {self.bytes / 1e6:,.1f} MB, {self.seconds:.1f} s"
        checked = f"{self.golden} golden rows lie within {self.difference:.1e} of evaluation"
        return [*rounded, f"{self.name}: {size}; {checked}: {self.folder}"]


def bound_of(config: Config, schema: Schema) -> float:
    """Return how far an export's scores may lie from evaluation's on a CPU, as `differences` counts it."""
    if config.trainer.amp:
        return EQUAL_AMP
    return EQUAL_NUMBERS if any(task.is_number for task in schema.tasks) else EQUAL


def export_model(
    config: Config, process: Process, source: Source, output: Path, sources: list[str | Path], options: Options
) -> Exported:
    """Write the export of a saved model to `output`, whole or not at all.

    sources: what `output` must not lie in.

    Raises:
        ConfigError: the model cannot be exported, or `output` holds something else; ExportError: the saved model is
            damaged, or the export's scores are not those of evaluation.
    """
    if process.world_size > 1:
        raise ConfigError(f"{COMMAND} is one process; found {process.world_size} ranks")
    refuse_gates(config.selection, "an export")
    begun = time.monotonic()
    config = prepared(config)
    schema = schema_of(config.data)
    model, _ = build_model(config, schema, process)
    if options.hidden:
        width_of(model.module.tower, schema.tasks)
    exported = Exported(output, f"{source.name}")
    with replacing_on_ranks(process, output, "--output", COMMAND, sources, []) as folder:
        job = _Job(config, schema, model, source, SealedWriter(folder), options)
        job.run(exported)
        bound = bound_of(config, schema)
        if not exported.errors and not exported.difference <= bound:
            raise ExportError(
                f"the export scores golden rows {exported.difference:.1e} away from evaluation, expected at most "
                f"{bound:.0e}; nothing was written"
            )
    exported.seconds = time.monotonic() - begun
    return exported


def prepared(config: Config) -> Config:
    """Return the configuration with which a model is built on the host for a few rows."""
    config.trainer.batch_size, config.trainer.compile, config.trainer.device = GOLDEN_BATCH, False, "cpu"
    config.embedding.cache_rows = config.embedding.cache_bytes = None
    return config


class _Job:
    """One export while it is written."""

    def __init__(
        self,
        config: Config,
        schema: Schema,
        model: DistributedModelParallel,
        source: Source,
        writer: SealedWriter,
        options: Options,
    ) -> None:
        self.config, self.schema, self.model, self.source, self.writer = config, schema, model, source, writer
        self.options = options
        self.network = model.module
        self.golden = golden_rows(config, schema)
        self._wanted = ids_by_table(self.golden, schema)

    def run(self, exported: Exported) -> None:
        newest = self.source.models[0]
        self._load_dense(newest)
        dims = dict(self.network.tower.embedding_dims)
        program = graph_of(
            self._tower(hidden=self.options.hidden), len(self.schema.numeric_names), len(self.schema.pooled_names)
        )
        folder = self.writer.folder
        self._write_more(program)
        save_graph(program, folder / TOWER)
        self.writer.seal_file(TOWER)
        plans = plans_of(self.network.tables, self.schema, dims, self.options.format)
        dense = write_dense(self.writer, newest, plans)
        tables = [self._write_table(plan, exported) for plan in plans]
        described = describe(self.config, self.schema, dims, tables, dense)
        if self.options.hidden:
            described = replace(described, hidden=width_of(self.network.tower, self.schema.tasks))
        self.writer.write(FEATURES, (json.dumps(described.to_json(), indent=1) + "\n").encode())
        self._write_golden()
        manifest = self.writer.finish(self._said())
        exported.rows = sum(table.rows for table in tables)
        exported.bytes = sum(file["bytes"] for file in manifest["files"].values())
        exported.golden = self.golden.num_rows
        exported.difference = Scorer(folder).check_golden()

    def _tower(self, *, hidden: bool = False) -> ServedTower:
        sequences = fields_of(self.config, self.schema).sequences
        tower, amp = self.network.tower, self.config.trainer.amp
        return ServedTower(tower, amp=amp, sequences=sequences, hidden=hidden)

    def _said(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": "export",
            "name": self.source.name,
            "step": self.source.step,
            "published": self.source.published,
            "model": model_of(asdict(self.config)),
        }

    def _load_dense(self, newest: SavedModel) -> None:
        found = {name.removeprefix("tower/"): value for name, value in newest.tensors("tower/").items()}
        try:
            self.network.tower.load_state_dict(found)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ExportError(f"{newest.place.name} does not hold the tower of this configuration: {reason}") from None
        for name, live in self.network.tables.tensors().items():
            if not name.startswith("tables/"):
                continue
            whole = live.local_shards()[0].tensor if hasattr(live, "local_shards") else live
            pieces = 0
            for _, offset, _, values in (one for one in newest.pieces(name) if one[0] == name):
                here = tuple(slice(at, at + size) for at, size in zip(offset, values.shape, strict=True))
                whole[here] = values
                pieces += 1
            if not pieces:
                raise ExportError(f"{newest.place.name} holds no {name}")

    def _write_table(self, plan: TablePlan, exported: Exported) -> StoredTable:
        def note(group: str, before: torch.Tensor, after: torch.Tensor) -> None:
            exported.errors.setdefault((plan.name, group), ConversionError()).add(before, after)

        if plan.rows is not None:
            return write_static(self.writer, plan, self.source.models[0], note)
        table = owned_tables(self.network.tables)[plan.name]
        decay = self.source.models[0].decay_of(plan.name)
        writer = TableWriter(plan.name, plan.features, plan.groups, decay=decay)
        table.decayed = decay.decayed
        conversion = Conversion(plan.stored, plan.groups, note)
        for part in newest_rows(self.source.models, plan.name):
            writer.add(conversion.columns(part))
            _import(table, part.take(is_in(part.ids, self._wanted[plan.name])))
        return writer.finish(self.writer)

    def _write_golden(self) -> None:
        scores = scores_of(self.model, self.config, self.golden)
        odd = np.flatnonzero(~np.isfinite(scores.reshape(len(scores), -1)).all(1))
        if len(odd):
            raise ExportError(
                f"evaluation gives {scores[odd[0]]} for golden row {odd[0]}, expected finite scores: weights or values "
                f"of features are too large for the model; nothing was written. The row: {_shown(self.golden, odd[0])}"
            )
        golden = self.golden.append_column(PREDICTION, pa.array(list(scores)))
        pq.write_table(golden, self.writer.folder / GOLDEN)
        self.writer.seal_file(GOLDEN)
        example = {"rows": self.golden.slice(0, 2).to_pylist()}
        self.writer.write(EXAMPLE, (json.dumps(example, indent=1, default=str) + "\n").encode())

    def _write_more(self, program: torch.export.ExportedProgram) -> None:
        if not (self.options.compiled or self.options.onnx):
            return
        from tessera.ctr.export.other_forms import write_compiled, write_onnx

        numeric, ids = len(self.schema.numeric_names), len(self.schema.pooled_names)
        if self.options.compiled:
            self.writer.seal_file(write_compiled(program, self.writer.folder))
        if self.options.onnx:
            self.writer.seal_file(write_onnx(self._tower(), self.writer.folder, numeric, ids))


def _shown(rows: pa.Table, number: int) -> str:
    return str(rows.slice(number, 1).to_pylist()[0])[:200]


def ids_by_table(golden: pa.Table, schema: Schema) -> dict[str, np.ndarray]:
    """Return the ids of some rows, sorted int64, by table."""
    decoder = RowDecoder(schema)
    rows = decoder.decode(decoder.table(golden))
    return {
        table: np.unique(np.concatenate([rows.bags[name].values for name in features]))
        for table, features in schema.tables.items()
    }


def _import(table: OwnedTable, part: RowPart) -> None:
    count = len(part.ids)
    if not count:
        return
    width = table.config.state_width
    zeros = torch.zeros(count, dtype=torch.int64)
    values = torch.from_numpy(np.array(part.values)).view(table.config.values_dtype)
    scale, decay = (None if one is None else torch.from_numpy(np.array(one)) for one in (part.scales, part.decay))
    ids, state = torch.from_numpy(np.array(part.ids)), torch.zeros(count, width)
    table.import_rows(RowBatch(ids, values, state, zeros, zeros + 1, scale=scale, decay=decay))
