"""IncCTR (arXiv 2009.02147) from day to day: the teacher of each day, and the rows of days before it that are replayed.

Its other modules need nothing of the day loop: admission counts over all days, rows that were there before the day move
by `optimizer.sparse.old_rows_factor`, and the one live model is the warm start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tessera.ctr.daily.partitions import sources_of
from tessera.ctr.daily.records import TRAINED, day_dir
from tessera.ctr.data.reservoir import add_to_reservoir
from tessera.ctr.train.teacher_logits import read_logits, score_teacher
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.embedding.errors import ConfigError

if TYPE_CHECKING:
    from tessera.ctr.daily.loop import Daily

RESERVOIR = "reservoir"


class Incremental:
    """What IncCTR adds to the days of `daily`.

    Raises ConfigError: it cannot go with the method.
    """

    def __init__(self, daily: Daily) -> None:
        self._daily, config = daily, daily.config.daily
        if config.method != "incremental" and (daily.distil or config.replay_rows is not None):
            key = "trainer.distil.kind" if daily.distil else "daily.replay_rows"
            raise ConfigError(f"{key} is set and daily.method is {config.method}; expected daily.method incremental")
        if config.replay_rows is not None and daily.config.trainer.replay.path is not None:
            raise ConfigError("daily.replay_rows and trainer.replay.path are both set; expected one of them")

    def ask_teacher(self, goes_on: bool) -> None:
        """Have the teacher's logits of the day's rows: progressive validation has them for KD-self, another run's
        model makes them for KD-batch. A model that has learnt nothing teaches nothing."""
        daily, distil = self._daily, self._daily.distil
        key, rows = daily.record["partition"], daily.readers["train"].rows
        kind, folder = distil.config.kind, day_dir(daily.log.folder, key)
        learnt = any(record["status"] == TRAINED for record in daily.records)
        if kind == "self" and not learnt and daily.config.trainer.warm_start.path is None:
            logits = torch.full((rows,), float("nan"))
        else:
            if kind == "batch":
                score_teacher(daily.config, daily.model, daily.readers["day"], daily.process, folder / "teacher", key)
                wait_for_all()
            logits = read_logits(folder / ("predictions" if kind == "self" else "teacher"), key, rows)
        if goes_on:
            distil.logits = logits
        else:
            distil.begin_period(logits)

    def sample_of_history(self) -> str | None:
        """The file with `daily.replay_rows` rows of all trained days, None before the first one is trained. It is made
        from that of the day before, when it is first wanted."""
        daily = self._daily
        trained = [record for record in daily.records if record["status"] == TRAINED]
        names = [f"{record['partition']}-{record['fingerprint']}.parquet" for record in trained]
        files = [daily.log.folder / RESERVOIR / name for name in names]

        def make() -> None:
            have = max((i for i, file in enumerate(files) if file.exists()), default=-1)
            for i in range(have + 1, len(files)):
                key = trained[i]["partition"]
                before = files[i - 1] if i else None
                size, seed = daily.config.daily.replay_rows, daily.config.trainer.seed
                add_to_reservoir(before, sources_of(daily.config, [key]), key, daily.schema, size, seed, files[i])
            for file in files[: -daily.config.daily.keep_days - 1]:
                file.unlink(missing_ok=True)

        daily.process.stage = "sampling earlier days"
        on_first_rank(daily.process, make)
        return str(files[-1]) if files else None
