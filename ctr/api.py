"""Train and score from Python, in a notebook too: no torchrun, one process.

    from tessera.ctr import api

    config = api.load_config("model=deepfm", "data=mine", "data.path=/data/mine", "trainer.run_dir=runs/mine")
    run = api.train(config)
    run.report["auc"], run.predictions().to_pandas()
    api.evaluate(run, "test", "data.path=/data/new").report["auc"]
    api.score(run, requests, keep=["request_id"]).to_pandas()

Mistakes raise `TesseraError` with the line that a command would print. Under torchrun the same calls join its ranks.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tessera.ctr.report.result import PREDICTIONS, TASKS, answer_folder, settle_result
from tessera.ctr.report.task_reports import kinds_of
from tessera.distributed.threads import let_idle_threads_sleep
from tessera.embedding.errors import ConfigError, TesseraError, did_you_mean

# What loads torch is imported in functions, once it is set how torch's threads wait.
if TYPE_CHECKING:
    from tessera.ctr.config import Config
    from tessera.distributed.rank import Process

MEMORY = "data-in-memory.parquet"  # so messages call the rows of a table or data frame

__all__ = ["Config", "Run", "TesseraError", "evaluate", "load_config", "score", "train"]


def __getattr__(name: str) -> Any:
    if name == "Config":
        from tessera.ctr.config import Config

        return Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Run:
    """A folder with a report: of a training run, or of an evaluation of one."""

    folder: Path

    @property
    def report(self) -> dict[str, Any]:
        """The content of report.json: auc, logloss, rows, ... of the main split, and those of all splits in `splits`.

        Raises ConfigError: there is none in the folder.
        """
        settle_result(self.folder)
        path = self.folder / "report.json"
        if not path.is_file():
            raise ConfigError(f"{self.folder} holds no report.json; expected the folder of a finished run")
        return json.loads(path.read_text())

    def predictions(self, split: str = "test", label: str = "") -> pa.Table:
        """Return the predictions for each row of a split: prediction float32, label, weight, and the other stored
        columns.

        label: which of several; also click_and_buy, of a funnel. Rows in which it does not count have weight 0.

        Raises ConfigError: the split was not scored, or there is no such label.
        """
        settle_result(self.folder)
        tasks = self.folder / TASKS
        if tasks.is_dir():
            names = list(kinds_of(tasks))
            if label not in names:
                found = f"label {label!r}" if label else "no label"
                raise ConfigError(f"{self.folder} has several labels: {', '.join(names)}; found {found}")
        elif label:
            raise ConfigError(f"{self.folder} has a single label; expected no name of one, found {label!r}")
        files = sorted(answer_folder(self.folder / PREDICTIONS, label).glob(f"{split}-*.parquet"))
        if not files:
            raise ConfigError(f"{self.folder} holds no predictions of split {split!r}")
        return pa.concat_tables([pq.read_table(path) for path in files])


def load_config(*overrides: str, config_dir: str | os.PathLike | Sequence[str | os.PathLike] = ()) -> Config:
    """Compose a configuration as the commands do: `load_config("model=deepfm", "data.path=/data")`.

    Args:
        overrides: `key=value`, as on a command line.
        config_dir: folders of your own yaml, laid out as conf/.

    Raises ConfigError: an unknown key, or a value that it does not take.
    """
    let_idle_threads_sleep()
    from tessera.ctr import config as configuration

    folders = [config_dir] if isinstance(config_dir, str | os.PathLike) else config_dir
    options = [word for folder in folders for word in ("--config-dir", str(folder))]
    return configuration.load_config([*options, *overrides], "")


def train(config: Config) -> Run:
    """Train as `tessera train` does and return the run with its report.

    Raises TesseraError: what the command would print as its error.
    """
    let_idle_threads_sleep()
    from tessera.ctr.train.trainer import Trainer

    with _process(config) as process:
        trainer = Trainer(config, process)
        try:
            trainer.fit()
        finally:  # a notebook keeps the frames of an exception, and with them what holds the folder
            trainer.log.close()
        return Run(Path(trainer.log.folder))


def evaluate(
    run: Run | str | os.PathLike,
    split: str = "test",
    *overrides: str,
    slices: Sequence[str] = (),
    output: str | os.PathLike | None = None,
) -> Run:
    """Score a split with the best model of a run, as `tessera evaluate` does, and return the folder of the scores.

    Args:
        overrides: `data.<key>=<value>` and `trainer.<key>=<value>`; other data is `data.path=/data/new`.
        slices: features by whose values the report breaks the metrics down.
        output: default evaluations/<time> in the folder of the run.

    Raises TesseraError: what the command would print as its error.
    """
    let_idle_threads_sleep()
    from tessera.ctr.runs.score import run_config, score_run
    from tessera.distributed.collectives import from_first_rank

    folder = run.folder if isinstance(run, Run) else Path(run)
    config = run_config(folder, list(overrides))
    with _process(config) as process:
        report = score_run(config, process, folder, split, Path(output) if output else None, slices)
        return Run(Path(from_first_rank(str(report.folder) if report else "")))


def score(
    run: Run | str | os.PathLike,
    data: Any,
    *overrides: str,
    keep: str | Sequence[str] = (),
) -> pa.Table:
    """Predict for rows without labels with the best model of a run, as `tessera score` does.

    Args:
        data: an Arrow table or a pandas data frame, in memory, or folders, files, patterns or URIs. Columns of features
            are those that training read; no others are needed.
        overrides: `data.<key>=<value>` and `trainer.<key>=<value>`.
        keep: columns of the data to have beside the predictions; the name of one may stand for a list of it.

    Returns a table with a row for each row of the data, in its order: the columns to keep, and `prediction` float32.

    Raises TesseraError: what the command would print as its error.
    """
    let_idle_threads_sleep()
    from tessera.ctr.runs.score_rows import columns_of, config_to_score, score_rows
    from tessera.distributed.collectives import from_first_rank, on_first_rank, wait_for_all

    folder = run.folder if isinstance(run, Run) else Path(run)
    keep = [keep] if isinstance(keep, str) else keep
    config = config_to_score(folder, list(overrides))
    table = None if isinstance(data, str | list | tuple | os.PathLike) else _table(data)
    if table is not None and not table.num_rows:
        return _no_predictions(table, keep, columns_of(config))
    with _process(config) as process, tempfile.TemporaryDirectory() as mine:
        place = Path(from_first_rank(mine))
        paths = data
        if table is not None:
            on_first_rank(process, lambda: _write(table, place / MEMORY))
            paths = place / MEMORY
        scored = score_rows(config, process, folder, paths, place / "scores", keep)
        files = [pq.read_table(scored.folder / name, partitioning=None) for name in scored.names]
        wait_for_all()
        return pa.concat_tables(files)


def _table(data: Any) -> pa.Table:
    """Return what somebody holds in memory as an Arrow table. Raises ConfigError: it is none, nor a data frame."""
    if isinstance(data, pa.Table):
        return data
    try:
        if isinstance(data, pa.RecordBatch):
            return pa.Table.from_batches([data])
        return pa.Table.from_pandas(data, preserve_index=False)
    except (AttributeError, ImportError):
        raise ConfigError(
            f"data is a {type(data).__name__}; expected an Arrow table, a pandas data frame, or paths"
        ) from None
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ConfigError(f"data cannot be read as a table: {' '.join(str(error).split())}") from None


def _no_predictions(table: pa.Table, keep: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Return what `score` does for a table without rows, which has no parquet file to read."""
    unknown = next((name for name in keep if name not in table.column_names), None)
    if unknown is not None:
        raise ConfigError(f"data has no column {unknown!r} to keep{did_you_mean(unknown, table.column_names)}")
    found = table.select(list(keep))
    for name in columns:
        found = found.append_column(name, pa.array([], pa.float32()))
    return found


def _write(table: pa.Table, path: Path) -> None:
    try:
        pq.write_table(table, path)
    except pa.ArrowException as error:
        raise ConfigError(f"data cannot be written as parquet: {' '.join(str(error).split())}") from None


@contextmanager
def _process(config: Config) -> Iterator[Process]:
    """Yield a process group for one call, and close it at the end; then the precision of matrices (`trainer.tf32`) is
    what it was before."""
    import torch
    import torch.distributed as dist

    from tessera.distributed import process as processes

    if dist.is_initialized():
        raise ConfigError("torch.distributed is in use in this process; expected no process group, one is made here")
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, convolutions.allow_tf32
    process = processes.start(config.trainer.device, config.trainer.timeout_seconds)
    try:
        yield process
    finally:
        processes.stop(process)
        matrices.allow_tf32, convolutions.allow_tf32 = before
