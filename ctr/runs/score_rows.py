"""Score rows that have no label yet: a prediction for each row of a data set, beside columns that say whose it is.

Each input file becomes an output file of the same name, with the rows in the same order; a large one becomes several.
A rank reads files of its own, but looks ids up together with the others: one that has no rows left goes on asking for
nothing until all are done. Files that are complete have their name, so a job that was stopped goes on behind them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.config import schema_of
from tessera.ctr.data.day_folders import DayFolders
from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.files import one_line
from tessera.ctr.data.labels import labels_of
from tessera.ctr.data.listing import Listing
from tessera.ctr.data.padding import empty, padded
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.units import Unit, dealt, units_of
from tessera.ctr.metrics.tasks import answers_of, logit_of, prediction_of
from tessera.ctr.models.hidden import Hidden, hidden_of
from tessera.ctr.network import build_model
from tessera.ctr.output_folders import check_place, claim
from tessera.ctr.runs.error_memory import read_memory
from tessera.ctr.runs.score import load_model_of_run, run_config
from tessera.ctr.serving.error_memory import ErrorMemory, base_of
from tessera.ctr.train.engine import set_tf32, set_threads
from tessera.ctr.train.evaluate import agree_on_files
from tessera.ctr.train.step_pipeline import to_device
from tessera.distributed.atomic import replacing_file, write_text
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.distributed.folder_lock import FolderInUse, FolderLock
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError, did_you_mean
from tessera.kernels import backend

PREDICTION = "prediction"
ELSEWHERE = ("data.path", "data.train", "data.valid", "data.test", "data.days")
PLAN, DONE, MARKER = ".score.json", "_score.json", "_SUCCESS"  # none of which readers of parquet take for data
ROWS_OF_UNIT = 4_000_000  # of a larger file several are made, so that ranks can share it


@dataclass(frozen=True)
class Scored:
    """folder: of the result; rows: with a prediction; bad_rows: without; names: of the files, in the order of the data;
    kept: how many of them an earlier call had made."""

    folder: Path
    rows: int
    bad_rows: int
    names: list[str]
    kept: int

    def summary(self) -> str:
        bad = f", {self.bad_rows:,} bad rows have none" if self.bad_rows else ""
        kept = f", {self.kept:,} of them from an earlier start" if self.kept else ""
        return f"{self.rows:,} predictions in {len(self.names):,} files{kept}{bad}: {self.folder}"


def config_to_score(run_dir: Path, overrides: Sequence[str]) -> Config:
    """Return the configuration of a run with overrides, as `run_config`.

    Raises ConfigError: also for an override that says which rows are read, which here `data` does.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key in ELSEWHERE or key.startswith("data.days."):
            raise ConfigError(f"override {override!r}: the rows to score are named by --data; expected no {key}")
    return run_config(run_dir, list(overrides))


def score_rows(
    config: Config,
    process: Process,
    run_dir: Path,
    data: str | Path | Sequence[str | Path],
    output: Path,
    keep: Sequence[str] = (),
    rows_of_unit: int = ROWS_OF_UNIT,
    memory: Path | None = None,
) -> Scored:
    """Write a prediction for each row of `data` to parquet files in `output`, on all ranks together.

    Args:
        config: the run's, from `config_to_score`.
        data: folders, files, patterns or URIs; columns of features are those that training read, no others are needed.
        keep: columns of the data that are copied beside the predictions (`columns_of`), as they are.
        rows_of_unit: rows that one file of the result has at most, but for a larger row group.
        memory: the folder of an error memory of the same model, by which predictions are corrected. It learns nothing.

    Raises:
        ConfigError: `output` holds something else than the beginning of the same result, or `keep` names a column
            twice, or one of predictions.
        SchemaError, DataError: the data lack a column, or hold a bad row, unless `data.bad_rows` is skip; then such a
            row has a null.
    """
    columns = columns_of(config)
    _check_names(keep, columns)
    process.folder = str(output)
    paths = [str(data)] if isinstance(data, str | Path) else [str(one) for one in data]
    set_threads(config)
    set_tf32(config, process)
    reader = row_reader(config, paths)
    agree_on_files(reader, process)
    fields = _kept_fields(reader, keep)
    units = units_of(reader.groups, rows_of_unit)
    model, _ = build_model(config, reader.schema, process)
    which, step = load_model_of_run(model, config, run_dir, process)
    base = base_of(model.module.tower.state_dict())
    errors = None if memory is None else read_memory(memory, base, model.module.tower, reader.schema.tasks)
    plan = _plan(run_dir, which, step, keep, reader, units) | {"checksum of the model": base}
    plan["error memory"] = None if errors is None else errors.checksum()
    sources: list[str | Path] = [run_dir, *paths]
    locks: list[FolderLock] = []
    try:
        on_first_rank(process, lambda: locks.append(_begin(output, plan, sources)))
        missing = on_first_rank(process, lambda: _missing(output, units))
        most = max((unit.rows for unit in missing), default=0)
        scorer = _Scorer(model, reader, process, output, fields, columns, most, errors)
        with nullcontext() if errors is None else hidden_of(model.module.tower) as scorer.hidden:
            scorer.run(dealt(missing, process.world_size))
        wait_for_all()
        names = [unit.name for unit in units]
        bad = on_first_rank(process, lambda: _finish(output, plan, names))
    finally:
        for lock in locks:
            lock.release()
    return Scored(output, reader.rows - bad, bad, names, len(units) - len(missing))


def columns_of(config: Config) -> list[str]:
    """Return the columns of predictions that a model gives: `prediction` or, of several labels, `prediction_buy`, and
    of a funnel `prediction_click_and_buy`."""
    answers = answers_of(labels_of(config.data.schema.labels))
    return [f"{PREDICTION}_{answer.name}" if answer.name else PREDICTION for answer in answers]


def _check_names(keep: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column in keep:
            raise ConfigError(f"--keep {column}: the predictions have this name; rename the column in the data")
    twice = next((name for name in keep if list(keep).count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--keep names {twice} twice")


def row_reader(config: Config, data: Sequence[str | Listing]) -> ParquetReader:
    """Return a reader of all rows in their order, for one rank. Columns that only training needs are not asked for."""
    schema = schema_of(replace(config.data, schema=replace(config.data.schema, weight=None, group=None, time=None)))
    return ParquetReader(
        data,
        schema,
        config.trainer.batch_size,
        shuffle=False,
        lanes=1,
        window_rows=config.data.window_rows,
        threads=config.data.threads,
        bad_rows=config.data.bad_rows,
        drop_labels=True,
        numbered=True,
        folders=DayFolders.of(config.data.partition),
        marker=config.daily.marker,
    )


def _kept_fields(reader: ParquetReader, keep: Sequence[str]) -> list[pa.Field]:
    """Return the fields of the columns to copy. A column without a single value is often written with the type null; it
    takes the type that other files have.

    Raises SchemaError: a file lacks one, has it more than once, or has it with another type.
    """
    found: dict[str, pa.DataType] = {}
    for file in reader.groups.files if keep else []:
        with file.open() as opened:
            schema = opened.schema_arrow
        for name in keep:
            places = schema.get_all_field_indices(name)
            if not places:
                raise SchemaError(f"{file.path}: no column {name!r} to keep{did_you_mean(name, schema.names)}")
            if len(places) > 1:
                raise SchemaError(f"{file.path}: column {name!r} to keep is there {len(places)} times; expected once")
            mine = schema.field(places[0]).type
            known = found.get(name, pa.null())
            if pa.null() not in (known, mine) and known != mine:
                raise SchemaError(f"{file.path}: column {name} is {mine}; other files have {known}")
            found[name] = known if known != pa.null() else mine
    return [pa.field(name, found[name]) for name in keep]


def _plan(
    run_dir: Path, which: str, step: int, keep: Sequence[str], reader: ParquetReader, units: list[Unit]
) -> dict[str, Any]:
    """Return what a result depends on: a later call goes on with it only if all of this is the same."""
    files = reader.groups.files[:: reader.groups.files_of_one]  # the first of those that share a checksum
    return {
        "run": str(run_dir.resolve()),
        "model": which,
        "step": step,
        "keep": list(keep),
        "contents": {file.name: one for file, one in zip(files, reader.groups.contents, strict=True)},
        "data": reader.groups.fingerprint,
        "files": {unit.name: unit.rows for unit in units},
    }


def _missing(output: Path, units: list[Unit]) -> list[Unit]:
    """Return the units whose files are not there. If there are any, nothing says any more that the result is whole."""
    missing = [unit for unit in units if not (output / unit.name).exists()]
    if missing:
        (output / MARKER).unlink(missing_ok=True)
    return missing


def _begin(output: Path, plan: dict[str, Any], sources: Sequence[str | Path]) -> FolderLock:
    """Make the folder, or check that an earlier call began the same result there."""
    check_place(output / next(iter(plan["files"])), "--output", sources)  # a pattern may match it, and not the folder
    claim(output, "--output", "score.py", sources)
    try:
        lock = FolderLock(output)
    except FolderInUse as error:
        raise ConfigError(f"--output {output}: {error}") from None
    record = next((output / name for name in (DONE, PLAN) if (output / name).exists()), None)
    left = next((name for name in plan["files"] if (output / name).exists()), None)
    if record is None and left is not None:
        lock.release()
        raise ConfigError(f"--output {output} holds {left} and no record of its model and data; expected a new folder")
    if record is None:
        write_text(output / PLAN, json.dumps(plan))
        return lock
    problem = _other_than(record, plan)
    if problem is not None:
        lock.release()
        raise ConfigError(f"--output {output} {problem}; expected a new folder")
    return lock


def _other_than(record: Path, plan: dict[str, Any]) -> str | None:
    """Return in what the result that an earlier call began differs from this one; None if in nothing."""
    try:
        earlier = json.loads(record.read_text())
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict):
        return f"holds a {record.name} that cannot be read, so nobody knows of which model and data its files are"
    other = next((key for key in plan if earlier.get(key) != plan[key]), None)
    if other is None:
        return None
    had, has = earlier.get(other), plan[other]
    if isinstance(had, dict) and isinstance(has, dict):
        first = next(name for name in [*has, *had] if had.get(name) != has.get(name))
        return f"holds predictions of other data: {first} has come, gone or changed"
    return f"holds predictions of another {other}, {str(earlier.get(other))[:60]}; found now {str(plan[other])[:60]}"


def _finish(output: Path, plan: dict[str, Any], names: Sequence[str]) -> int:
    """Write what the result is, and that it is complete. Return how many rows have no prediction."""
    rows, bad = 0, 0
    for name in names:
        footer = pq.read_metadata(output / name)
        groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
        rows += footer.num_rows
        filled = [group for group in groups if group.num_rows]  # one without rows has no statistics
        bad += sum(group.column(group.num_columns - 1).statistics.null_count for group in filled)
    write_text(output / DONE, json.dumps({**plan, "rows": rows - bad, "bad_rows": bad}, indent=1) + "\n")
    (output / PLAN).unlink(missing_ok=True)
    (output / MARKER).touch()
    return bad


class _Scorer:
    """Scores units of one rank, in step with the other ranks."""

    def __init__(
        self,
        model: DistributedModelParallel,
        reader: ParquetReader,
        process: Process,
        output: Path,
        fields: Sequence[pa.Field],
        columns: Sequence[str],
        most_rows: int,
        memory: ErrorMemory | None,
    ) -> None:
        """columns: of predictions. most_rows: of a unit; batches are no larger, as they are filled up to one size."""
        self._model, self._reader, self._process = model, reader, process
        self._memory = memory
        self.hidden: Hidden | None = None
        self._output, self._fields = output, list(fields)
        self._labels = reader.schema.tasks
        self._answers = answers_of(self._labels)
        self._schema = pa.schema([*fields, *(pa.field(name, pa.float32()) for name in columns)])
        self._rows = max(1, min(most_rows, reader.batch_size // process.world_size))
        self._reader.batch_size = self._rows

    @torch.no_grad()
    def run(self, shares: list[list[Unit]]) -> None:
        """Write the files of this rank's share. shares: the units of each rank."""
        self._model.eval()
        mine = shares[self._process.rank]
        steps = [sum(-(-unit.rows // self._rows) for unit in share) for share in shares]
        done = 0
        for unit in mine:
            done += self._write(unit)
        for _ in range(done, max(steps)):  # other ranks still look up ids of which this one owns a part
            self._process.stage = "scored; other ranks go on"
            self._scores(empty(self._reader.schema, self._rows))

    def _write(self, unit: Unit) -> int:
        """Write one file; return the number of batches."""
        path, steps = self._output / unit.name, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        groups = self._reader.groups
        first = int(groups.first[unit.first]) if unit.rows else 0
        values, known = np.zeros((len(self._answers), unit.rows), np.float32), np.zeros(unit.rows, bool)
        for batch in self._reader.part(unit.first, unit.stop).epoch(0) if unit.rows else ():
            self._process.stage = f"scoring {unit.name}, batch {steps}"
            assert batch.number is not None
            places = batch.number[: batch.rows].numpy() - first
            values[:, places], known[places] = self._scores(padded(batch, self._rows))[:, : batch.rows], True
            steps += 1
        backend.check(self._process.device)
        with replacing_file(path) as partial, pq.ParquetWriter(partial, self._schema) as writer:
            begin = 0
            for group in range(unit.first, unit.stop):
                rows = int(groups.rows[group])
                part = slice(begin, begin + rows)
                predictions = [pa.array(one[part], mask=~known[part]) for one in values]
                writer.write_table(pa.table([*self._kept(group, rows), *predictions], schema=self._schema))
                begin += rows
        return steps

    def _scores(self, batch: Batch) -> np.ndarray:
        """Return what is said of each row, float32 [answers, B]."""
        logits, _ = self._model(to_device(batch, self._process.device))
        found = [prediction_of(one, logit_of(one, self._labels, logits)) for one in self._answers]
        if self._memory is not None and self.hidden is not None:
            found = [self._memory.corrected(self.hidden.take().cpu(), found[0].cpu())]
        return torch.stack(found).cpu().numpy()

    def _kept(self, group: int, rows: int) -> Iterator[pa.Array | pa.ChunkedArray]:
        """Yield the columns to copy of one row group; nulls where it cannot be read and bad rows are skipped."""
        if not self._fields:
            return
        groups = self._reader.groups
        file = groups.files[groups.file[group]]
        try:
            with file.open() as opened:
                table = opened.read_row_group(int(groups.index[group]), [field.name for field in self._fields])
        except (pa.ArrowException, OSError) as error:
            if not self._reader.decoder.skip_bad_rows:
                raise DataError(f"{groups.where(group)}: {one_line(error)}") from None
            yield from (pa.nulls(rows, field.type) for field in self._fields)
            return
        for field in self._fields:
            column = table[field.name]
            yield column if column.type == field.type else pa.nulls(rows, field.type)
