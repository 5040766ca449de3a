"""IncCTR (arXiv 2009.02147) from day to day: the teacher of each day, and the rows of days before it that are replayed.

Its other modules need nothing of the day loop: admission counts over all days, rows that were there before the day move
by `optimizer.sparse.old_rows_factor`, and the one live model is the warm start.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tessera.ctr.config import Config
from tessera.ctr.daily.day_record import Days
from tessera.ctr.daily.partitions import sources_of
from tessera.ctr.daily.records import day_dir
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.reservoir import add_to_reservoir
from tessera.ctr.data.schema import Schema
from tessera.ctr.distil.teacher_logits import logits_folder, read_logits, score_teacher
from tessera.ctr.train.engine import Engine
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

RESERVOIR = "reservoir"


def check_method(config: Config) -> None:
    """Raise ConfigError where a key of IncCTR cannot go with the method of retraining."""
    daily, distils = config.daily, config.trainer.distil.kind != "none"
    if daily.method != "incremental" and (distils or daily.replay_rows is not None):
        key = "trainer.distil.kind" if distils else "daily.replay_rows"
        raise ConfigError(f"{key} is set and daily.method is {daily.method}; expected daily.method incremental")
    if daily.replay_rows is not None and config.trainer.replay.path is not None:
        raise ConfigError("daily.replay_rows and trainer.replay.path are both set; expected one of them")


def ask_teacher(engine: Engine, days: Days, reader: ParquetReader, rows: int, run_dir: Path, *, goes_on: bool) -> None:
    """Have the teacher's logits of the current day's rows: progressive validation has them for KD-self, another run's
    model makes them for KD-batch. A model that has learnt nothing teaches nothing.

    reader: of the day, for evaluation. rows: of the reader that trains. goes_on: inside the day.
    """
    assert engine.distil is not None and days.current is not None
    distil, process, key = engine.distil, engine.process, days.current.partition
    kind, folder, labels = distil.config.kind, day_dir(run_dir, key), engine.schema.tasks
    if kind == "self" and not days.trained and engine.config.trainer.warm_start.path is None:
        logits = torch.full((rows, len(labels)) if len(labels) > 1 else (rows,), float("nan"))
    else:
        told = folder / "predictions" if kind == "self" else logits_folder(folder / "teacher", labels)
        if kind == "batch":
            score_teacher(engine.config, engine.model, reader, process, told, key)
            wait_for_all()
        logits = read_logits(told, key, rows, labels)
    if goes_on:
        distil.logits = logits
    else:
        distil.begin_period(logits)


def sample_of_history(config: Config, schema: Schema, process: Process, days: Days, run_dir: Path) -> str | None:
    """The file with `daily.replay_rows` rows of all trained days, None before the first one is trained. It is made from
    that of the day before, when it is first wanted."""
    trained, daily = days.trained, config.daily
    size = daily.replay_rows
    assert size is not None  # or nothing is replayed
    files = [run_dir / RESERVOIR / f"{record.partition}-{record.fingerprint}.parquet" for record in trained]

    def make() -> None:
        have = max((i for i, file in enumerate(files) if file.exists()), default=-1)
        for i in range(have + 1, len(files)):
            key = trained[i].partition
            before, seed = files[i - 1] if i else None, config.trainer.seed
            add_to_reservoir(before, sources_of(config, [key]), key, schema, size, seed, files[i])
        for file in files[: -daily.keep_days - 1]:
            file.unlink(missing_ok=True)

    process.stage = "sampling earlier days"
    on_first_rank(process, make)
    return str(files[-1]) if files else None
