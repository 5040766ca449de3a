"""Where the numbers of a run go beside metrics.jsonl (`trainer.loggers`): TensorBoard, MLflow, Weights & Biases.

MLflow and Weights & Biases may stand behind a network, so a thread of their own talks to them. What fails there, or is
slow, costs numbers there and one warning, never a run. Rank 0 alone logs.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tessera.distributed.atomic import write_text
from tessera.embedding.errors import ConfigError

IDENTITIES = "loggers.json"  # in the run folder: name of a logger -> what its run is called there
WAITING = 10_000  # calls that may wait for a service; those beyond it are left out
CLOSE_SECONDS = 30.0  # how long the end of a run waits for what was not sent yet
_WRITING = threading.Lock()  # loggers.json
TOGETHER = 500  # numbers in one message to MLflow, which takes 1,000


class Logger(ABC):
    """Takes numbers of a run."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name; names have parts, `valid/auc`."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left."""


class TensorBoard(Logger):
    """Events in `tensorboard/` of the run folder. after: the step that the run goes on behind, None for a new one."""

    def __init__(self, folder: Path, after: int | None) -> None:
        purge = {} if after is None else {"purge_step": after + 1}
        self._writer = SummaryWriter(folder / "tensorboard", **purge)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MLflow(Logger):
    """A run of MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME.

    known: the id of the run that this one goes on with.
    """

    def __init__(self, name: str, folder: Path, config: Mapping[str, str], known: str | None) -> None:
        mlflow = importlib.import_module("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        if known is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            known = str(self._client.create_run(number, run_name=name).info.run_id)
            params = [self._entities.Param(key, value[:500]) for key, value in config.items()]
            for begin in range(0, len(params), 100):  # MLflow takes 100 in a message
                self._client.log_batch(known, params=params[begin : begin + 100])
        else:
            self._client.update_run(known, status="RUNNING")
        self.identity = known

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, float(value), now, step) for name, value in values.items()]
        for begin in range(0, len(metrics), TOGETHER):
            self._client.log_batch(self.identity, metrics=metrics[begin : begin + TOGETHER])

    def close(self) -> None:
        self._client.set_terminated(self.identity)


class Wandb(Logger):
    """A run of Weights & Biases, as its own variables of the environment say (WANDB_PROJECT, WANDB_MODE=offline).

    Numbers stand over their `step`: those of days have steps of their own, and W&B takes no step that is behind.
    """

    def __init__(self, name: str, folder: Path, config: Mapping[str, str], known: str | None) -> None:
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            id=known, resume="allow", name=name, dir=str(folder), config=dict(config), settings=settings
        )
        self._run.define_metric("*", step_metric="step")
        self.identity = str(self._run.id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


Remote = type[MLflow] | type[Wandb]
REMOTE: dict[str, Remote] = {"mlflow": MLflow, "wandb": Wandb}


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError if a package of these loggers is not here, naming the extra that brings it."""
    for name in names:
        if name in REMOTE and importlib.util.find_spec(name) is None:
            raise ConfigError(f"trainer.loggers has {name}, which is not installed: pip install tessera-ctr[{name}]")


def named_values(config: Any, where: str = "") -> dict[str, str]:
    """Return the values of a configuration, or of a mapping in it, by dotted key, as text."""
    found: dict[str, str] = {}
    for name, value in (asdict(config) if is_dataclass(config) and not isinstance(config, type) else config).items():
        if isinstance(value, Mapping):
            found |= named_values(value, f"{where}{name}.")
        else:
            found[f"{where}{name}"] = str(value)
    return found


def open_loggers(
    names: Sequence[str], folder: Path, config: Mapping[str, str], warn: Callable[[str], None], after: int | None
) -> list[Logger]:
    """Return the loggers of a run.

    config: what the run is made of, by key. warn: told once of each logger that fails. after: the step that the run
    goes on behind, None for a new one.
    """
    loggers: list[Logger] = []
    for name in names:
        if name in REMOTE:
            loggers.append(_Background(name, REMOTE[name], folder, config, warn, goes_on=after is not None))
        else:
            loggers.append(TensorBoard(folder, after))
    return loggers


class _Background(Logger):
    """Has a thread open and feed another logger, and gives it up at its first error."""

    def __init__(
        self,
        name: str,
        make: Remote,
        folder: Path,
        config: Mapping[str, str],
        warn: Callable[[str], None],
        *,
        goes_on: bool,
    ) -> None:
        self._name, self._folder = name, folder
        self._said: Callable[[str], None] = warn
        self._warned = threading.Lock()
        self._calls: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(WAITING)
        self._failed: str | None = None
        known = _identities(folder).get(name) if goes_on else None
        # A daemon: a service that hangs must not keep the process.
        self._thread = threading.Thread(target=self._feed, args=(make, config, known), name=name, daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._tell():
            return
        try:
            self._calls.put_nowait((dict(values), step))
        except queue.Full:
            self._failed = f"{WAITING:,} lines wait for it"
            self._tell()

    def close(self) -> None:
        if self._failed is None:
            ends = time.monotonic() + CLOSE_SECONDS
            try:
                self._calls.put(None, timeout=CLOSE_SECONDS)
                self._thread.join(max(0.0, ends - time.monotonic()))
            except queue.Full:
                pass
            if self._thread.is_alive():
                self._failed = f"it did not take everything within {CLOSE_SECONDS:.0f} s"
        self._tell()

    def _tell(self) -> bool:
        """Warn of a failure, by the thread that trains, once; return whether there was one."""
        if self._failed is None:
            return False
        if self._warned.acquire(blocking=False):
            self._said(f"trainer.loggers: {self._name} gets nothing more of this run: {self._failed}")
        return True

    def _feed(self, make: Remote, config: Mapping[str, str], known: str | None) -> None:
        try:
            logger = make(self._folder.name, self._folder, config, known)
            if logger.identity != known:
                with _WRITING:
                    both = _identities(self._folder) | {self._name: logger.identity}
                    write_text(self._folder / IDENTITIES, json.dumps(both) + "\n")
            while (call := self._calls.get()) is not None and self._failed is None:
                logger.scalars(*call)
            if call is None:
                logger.close()
        except Exception as error:  # whatever a package of others raises: training goes on
            line = next(iter(str(error).splitlines()), "")
            self._failed = f"{type(error).__name__}: {line}"[:300]


def _identities(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / IDENTITIES).read_text())
    except (OSError, ValueError):
        return {}
    return {str(name): str(one) for name, one in found.items()} if isinstance(found, dict) else {}
