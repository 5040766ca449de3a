"""Progressive evaluation beside an error memory (`daily.memory`): a day's rows in order of time, corrected by the
labels that were known by then (ReLoop2, Zhu et al., KDD 2023).

Each rank writes what the model's last layer reads of its rows to a file while the day is evaluated; the first one goes
through them in order of time. The memory is saved with the day. The next day goes on with it if the model is the same,
as where a day was held or with method stale; else it begins empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.ctr.config import Config
from tessera.ctr.daily.config import DailyMemoryConfig
from tessera.ctr.daily.day_record import DayRecord
from tessera.ctr.daily.records import day_dir
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.schema import Schema
from tessera.ctr.metrics.exact import auc, logloss
from tessera.ctr.models.hidden import hidden_of
from tessera.ctr.models.tower import Tower
from tessera.ctr.runs.error_memory import width_of
from tessera.ctr.serving.error_memory import FILE, ErrorMemory, MemorySettings, base_of
from tessera.ctr.serving.errors import ExportError
from tessera.ctr.serving.in_time import Labelled, corrected_in_time
from tessera.distributed.atomic import write_text
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.distributed.rank import Process
from tessera.embedding.errors import ConfigError

FOLDER, RESULT = "memory", "corrected.json"  # in the folder of a day
COLUMNS = ("time", "prediction", "label", "weight")  # beside hidden, of each row
HOUR = 3600


class CorrectedDays:
    """Corrects the rows of each day that is evaluated.

    Raises ConfigError: the model cannot have an error memory, or rows have no time.
    """

    def __init__(self, config: Config, schema: Schema, tower: Tower, process: Process, run_dir: Path) -> None:
        self.config, self.process, self._run_dir, self._tower = config.daily.memory, process, run_dir, tower
        self._width = width_of(tower, schema.tasks)
        self._keep_days = config.daily.keep_days
        if schema.time is None:
            raise ConfigError(
                "daily.memory.enabled is true; expected data.schema.time, in whose order labels are known"
            )
        if config.trainer.compile:
            raise ConfigError(
                "daily.memory.enabled is true; expected trainer.compile false, which hides the last layer"
            )

    @contextmanager
    def watching(self, partition: str) -> Iterator[Callable[[Batch, Tensor], None]]:
        """Yield what an evaluation tells of its batches; it writes what `correct` reads. On every rank."""
        folder = day_dir(self._run_dir, partition) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        with open(_hidden(folder, self.process.rank), "wb") as file, hidden_of(self._tower) as hidden:

            def watch(batch: Batch, logits: Tensor) -> None:
                assert batch.time is not None
                known = batch.weight if batch.known is None else batch.weight * batch.known[:, 0]
                of = (batch.time, torch.sigmoid(logits), batch.labels[:, 0], known)
                for name, values in zip(COLUMNS, of, strict=True):
                    columns[name].append(values[: batch.rows].cpu().numpy())
                file.write(hidden.take()[: batch.rows].cpu().contiguous().numpy().tobytes())

            yield watch
        for name, parts in columns.items():
            dtype = np.int64 if name == "time" else np.float32
            np.save(_column(folder, name, self.process.rank), np.concatenate([np.zeros(0, dtype), *parts]))
        wait_for_all()

    def correct(self, partition: str, done: Sequence[DayRecord]) -> str:
        """Write the day's result and the memory behind it; return what to say of it. On every rank, after `watching`.

        done: the records of the days before.
        """
        self.process.stage = f"correcting {partition}"
        return on_first_rank(self.process, lambda: self._correct(partition, done))

    def _correct(self, partition: str, done: Sequence[DayRecord]) -> str:
        folder = day_dir(self._run_dir, partition) / FOLDER
        memory, note = self._memory([record.partition for record in done])
        columns = {name: _joined(folder, name, self.process.world_size) for name in COLUMNS}
        read = _reader(folder, self._width, columns, self.process.world_size)
        learnt, chosen = memory.rows, self.config
        corrected = corrected_in_time(
            memory,
            columns["time"],
            read,
            delay_seconds=chosen.delay_seconds,
            block_seconds=chosen.block_seconds,
            block_rows=chosen.block_rows,
        )
        memory.save(folder)
        for path in folder.iterdir():
            if path.name != FILE:
                path.unlink()
        for record in done[: max(0, len(done) - self._keep_days)]:
            (day_dir(self._run_dir, record.partition) / FOLDER / FILE).unlink(missing_ok=True)
        whole = _metrics(columns, corrected, np.ones(len(corrected), bool))
        hours = (columns["time"] // HOUR).tolist()
        by_hour = [
            {"hour": hour, **_metrics(columns, corrected, columns["time"] // HOUR == hour)} for hour in sorted({*hours})
        ]
        said = {"model": memory.base, "rows_before": learnt, "rows_behind": memory.rows, **whole, "hours": by_hour}
        write_text(folder.parent / RESULT, json.dumps(said, indent=1) + "\n")
        shown = [
            f"{name} {_shown(whole[name])}, corrected {_shown(whole['corrected_' + name])}"
            for name in ("auc", "logloss")
        ]
        return f"{partition} · error memory{note} · {' · '.join(shown)}"

    def _memory(self, before: Sequence[str]) -> tuple[ErrorMemory, str]:
        """Return the memory to begin with: that of the day before where the model is the same."""
        settings, base = settings_of(self.config), base_of(self._tower.state_dict())
        empty = ErrorMemory(self._width, settings, base)
        folder = day_dir(self._run_dir, before[-1]) / FOLDER if before else None
        if folder is None or not (folder / FILE).exists():
            return empty, ""
        try:
            memory = ErrorMemory.load(folder, settings)
        except ExportError as error:
            return empty, f" (begins empty: {error})"
        same = {name: getattr(memory.settings, name) for name in ("arrays", "bits", "seed")}
        wanted = {name: getattr(settings, name) for name in same}
        return (memory, "") if (memory.base, memory.width, same) == (base, self._width, wanted) else (empty, "")


def settings_of(config: DailyMemoryConfig) -> MemorySettings:
    """Return how a memory reads and writes, of the keys."""
    return MemorySettings(**{name: getattr(config, name) for name in vars(MemorySettings())})


def _hidden(folder: Path, rank: int) -> Path:
    return folder / f"hidden-{rank:05d}.bin"


def _column(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}-{rank:05d}.npy"


def _joined(folder: Path, name: str, ranks: int) -> np.ndarray:
    return np.concatenate([np.load(_column(folder, name, rank)) for rank in range(ranks)])


def _reader(folder: Path, width: int, columns: dict[str, np.ndarray], ranks: int) -> Callable[[np.ndarray], Labelled]:
    """Return what reads rows by their places, ranks one behind the other, of files larger than memory."""
    counts = [len(np.load(_column(folder, "time", rank), mmap_mode="r")) for rank in range(ranks)]
    first = np.concatenate([[0], np.cumsum(counts)])
    files = [
        np.memmap(_hidden(folder, rank), np.float32, "r", shape=(rows, width))
        if rows
        else np.zeros((0, width), np.float32)
        for rank, rows in enumerate(counts)
    ]

    def read(places: np.ndarray) -> Labelled:
        hidden = np.empty((len(places), width), np.float32)
        for rank, file in enumerate(files):
            here = (places >= first[rank]) & (places < first[rank + 1])
            hidden[here] = file[places[here] - first[rank]]
        of = [torch.from_numpy(columns[name][places]) for name in ("prediction", "label", "weight")]
        return Labelled(torch.from_numpy(hidden), of[0], of[1], of[2] > 0)

    return read


def _metrics(columns: dict[str, np.ndarray], corrected: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    label, weight = columns["label"][chosen], columns["weight"][chosen]
    found: dict[str, Any] = {"rows": int((weight > 0).sum())}
    for begin, prediction in (("", columns["prediction"]), ("corrected_", corrected)):
        found |= {f"{begin}{metric.__name__}": metric(prediction[chosen], label, weight) for metric in (auc, logloss)}
    return found


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.5f}"
