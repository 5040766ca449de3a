"""Who the teacher is and what it says: logits of all rows of a period, from one pass of evaluation.

They are kept as predictions are, parquet files with numbers of rows and their logits. So whoever has evaluated the
model on the rows of a period before training on them (progressive validation) has the logits of KD-self already.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.config import Config
from tessera.ctr.data.config import schema_of
from tessera.ctr.data.labels import Label
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.metrics.tasks import answers_of, is_single
from tessera.ctr.network import build_model
from tessera.ctr.report.result import answer_folder
from tessera.ctr.runs.saved_model import load_model
from tessera.ctr.runs.score import run_config
from tessera.ctr.train.engine import Engine
from tessera.ctr.train.evaluate import evaluate, read_split
from tessera.distributed.atomic import sync_file, write_text
from tessera.distributed.collectives import from_first_rank, wait_for_all
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError, TesseraError

SPLIT = "train"
COMPLETE = "complete.json"  # written last


def prepare(engine: Engine, reader: ParquetReader, folder: Path) -> None:
    """Have the logits of all training rows, from `folder` or, the first time, from the teacher.

    KD-self: the teacher is the model as it is now, so call this before the first step. KD-batch: another run's best
    model, which is in memory beside this one for the time of the pass.

    Raises:
        ConfigError: no such run, or KD-self with nothing learnt so far.
        TesseraError: the logits are not those of the training rows, or not complete.
    """
    process, config, distil = engine.process, engine.config.trainer.distil, engine.distil
    assert distil is not None  # or nobody asks for a teacher
    made_of = {"kind": config.kind, "teacher": config.teacher, "rows": reader.rows, "data": reader.groups.fingerprint}
    found = _described(folder, process)
    if found is None:
        if engine.step:
            raise TesseraError(f"{folder} has no logits of the teacher, and training is at step {engine.step}")
        if config.kind == "self" and engine.config.trainer.warm_start.path is None:
            raise ConfigError(
                "trainer.distil.kind is self; expected trainer.warm_start.path, or it has nothing to tell"
            )
        if process.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        wait_for_all()
        scored = read_split(engine.config, engine.schema, process, SPLIT)
        assert scored is not None  # `reader` reads the same split
        score_teacher(engine.config, engine.model, scored, process, logits_folder(folder, engine.schema.tasks))
        wait_for_all()
        if process.is_main:
            _seal(folder, made_of)
        wait_for_all()
    elif found != made_of:
        key = next(key for key in made_of if found.get(key) != made_of[key])
        raise TesseraError(f"{folder}: {key} is {found.get(key)!r}; the run has {made_of[key]!r}")
    labels = engine.schema.tasks
    logits = read_logits(logits_folder(folder, labels), SPLIT, reader.rows, labels)
    _check_shared(folder, logits, process)
    distil.logits = logits


def score_teacher(
    config: Config,
    model: DistributedModelParallel,
    reader: ParquetReader,
    process: Process,
    folder: Path,
    split: str = SPLIT,
) -> None:
    """Write the logits of the teacher that `trainer.distil` names for the rows of a reader that numbers them.

    model: the one in training, which is the teacher of KD-self as it is.

    Raises:
        ConfigError, TesseraError: KD-batch, and `teacher` is no run folder with a model, reads other columns, or has
            other labels.
    """
    distil = config.trainer.distil
    if distil.kind == "self":
        evaluate(model, reader, process, folder, split)
        return
    assert distil.teacher is not None  # of another run, if not of this one
    own = (config.model.get("target"), config.numeric.get("target"))
    theirs = run_config(Path(distil.teacher), [], [*distil.targets, *(name for name in own if name is not None)])
    schema = schema_of(theirs.data)
    if schema.id_names != reader.schema.id_names or schema.numeric_names != reader.schema.numeric_names:
        raise ConfigError(f"trainer.distil.teacher {distil.teacher} reads other features; expected those of this run")
    _check_labels(distil.teacher, schema.tasks, reader.schema.tasks)
    with torch.random.fork_rng():  # dropout and first values of the run do not depend on its teacher
        teacher, _ = build_model(theirs, schema, process)
    load_model(teacher, Path(distil.teacher) / "best", process)
    evaluate(teacher, reader, process, folder, split)


def _check_labels(teacher: str, theirs: Sequence[Label], own: Sequence[Label]) -> None:
    """Raise ConfigError unless both have the same labels in the same spaces. A single one may be called otherwise."""
    told, wanted = ([(one.name, one.parent, one.is_number) for one in labels] for labels in (theirs, own))
    if told != wanted and not (is_single(theirs) and is_single(own)):
        names, expected = (", ".join(one.name for one in labels) for labels in (theirs, own))
        raise ConfigError(
            f"trainer.distil.teacher {teacher} answers {names}; expected the labels of this run, {expected}, each with "
            "the same where and loss"
        )


def logits_folder(folder: Path, labels: Sequence[Label]) -> Path:
    """Return where, in the teacher's folder, its predictions are written as `evaluate` does: those of several labels in
    folders beside that one, which must not be those of the run's own result."""
    return folder if is_single(labels) else folder / "logits"


def read_logits(folder: Path, split: str, rows: int, labels: Sequence[Label] = (Label(),)) -> Tensor:
    """Return logits by row number, float32 [rows] or of several labels [rows, T], of the predictions of all ranks; NaN
    where there is none. folder: as `evaluate` was told.

    Raises TesseraError: no such predictions, or numbers of rows beyond `rows`.
    """
    own = [answer for answer in answers_of(labels) if not answer.joint]
    columns = [_read_logits(answer_folder(folder, answer.name), split, rows) for answer in own]
    return torch.stack(columns, 1) if len(columns) > 1 else columns[0]


def _read_logits(folder: Path, split: str, rows: int) -> Tensor:
    logits = torch.full((rows,), float("nan"))
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise TesseraError(f"{folder} holds no predictions of {split}")
    for path in files:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not {"row", "logit"} <= set(file.schema_arrow.names):
                raise TesseraError(f"{path}: found no columns row and logit; the reader did not number rows")
            for batch in file.iter_batches(columns=["row", "logit"]):
                number, logit = (torch.from_numpy(column.to_numpy().copy()) for column in batch.columns)
                if number.numel() and int(number.max()) >= rows:
                    raise TesseraError(f"{path}: found row {int(number.max())}, expected numbers below {rows}")
                logits[number] = logit
    return logits


def _described(folder: Path, process: Process) -> dict[str, Any] | None:
    """Return the description of complete logits, as rank 0 finds it; None if there are none. Collective."""
    complete = folder / COMPLETE
    return from_first_rank(json.loads(complete.read_text()) if process.is_main and complete.exists() else None)


def _seal(folder: Path, made_of: dict[str, Any]) -> None:
    """Make the files durable, then say that they are complete: states of the run count on them."""
    for path in folder.rglob("*.parquet"):
        sync_file(path)
    write_text(folder / COMPLETE, json.dumps(made_of))


def _check_shared(folder: Path, logits: Tensor, process: Process) -> None:
    mine = int((~logits.isnan()).sum())
    main = from_first_rank(mine)
    if mine != main:
        raise TesseraError(
            f"{folder}: rank {process.rank} finds logits of {mine:,} rows, rank 0 of {main:,}; "
            "with distillation the run folder must be on storage that all hosts share"
        )
