"""The folder of a run: a new one, or that of a run to go on with; never one that another job writes to."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from tessera.ctr.config import Config
from tessera.ctr.data.config import SPLITS, paths_of
from tessera.ctr.output_folders import check_place
from tessera.distributed.collectives import from_first_rank
from tessera.distributed.folder_lock import FolderInUse, FolderLock
from tessera.distributed.locations import missing_bucket
from tessera.distributed.process import job_store
from tessera.distributed.rank import Process
from tessera.distributed.saved.states import names_of_states
from tessera.distributed.saved.storage import Storage
from tessera.embedding.errors import ConfigError

# What a run has written before its first log line, evaluation or saved state. `.lock` says that it is a run's folder.
LOCK = ".lock"
AT_START = ("config.yaml", "plan.txt", "versions.json", "teacher.json", "train.log", "metrics.jsonl", "loggers.json")
FOLDERS_AT_START = ("tensorboard", "wandb", "checkpoints")
RESTART_WAIT_SECONDS = 30.0  # after a restart the ranks before may still be on their way out


class RunFolder:
    """
    Attributes:
        path: the folder, the same on all ranks.
        may_go_on: it may hold states to go on from: `trainer.resume` says so, or torchrun has restarted the ranks.
        lock: on rank 0, held until it is released or the process ends.

    Raises:
        ConfigError: it holds something else, cannot be made, or another job writes to it.
    """

    def __init__(self, config: Config, default: str, process: Process) -> None:
        self.lock: FolderLock | None = None
        agreed: list = [None, None, None]
        if process.is_main:
            # The store forgets only with the launcher: it knows the name that this job chose before a restart. What
            # this very process chose is another run of it.
            store, me = job_store(), f"{os.getpid()}@{socket.gethostname()}"
            known = store.get("run_dir").decode() if store.check(["run_dir"]) else me
            chooser, _, chosen = known.partition(" ")
            restarted = chooser != me
            path = Path(chosen if restarted else config.trainer.run_dir or default)
            may_go_on = restarted or config.trainer.resume is not None
            problem = _in_the_data(config, path) or _states_elsewhere(config, may_go_on=may_go_on)
            problem = problem or _make(path, "trainer.run_dir", may_go_on=may_go_on)
            problem = problem or self._take(path, restarted=restarted)
            if problem is None and not may_go_on:
                problem = _begin_again(path)
            if problem is None:
                store.set("run_dir", f"{me} {path}")
            agreed = [str(path), may_go_on, problem]
        path, self.may_go_on, problem = from_first_rank(agreed)
        if problem:
            raise ConfigError(problem)
        self.path = Path(path)
        process.folder = str(path)

    def _take(self, path: Path, *, restarted: bool) -> str | None:
        try:
            self.lock = FolderLock(path, RESTART_WAIT_SECONDS if restarted else 0.0)
        except FolderInUse as error:
            return str(error)
        except OSError as error:
            return f"trainer.run_dir {path} cannot be written to: {error.strerror}"
        return None


def _in_the_data(config: Config, run_dir: Path) -> str | None:
    """Return the problem if the run would write inside the data, where its predictions would be read as data; else
    None."""
    states = config.trainer.checkpoint.folder
    try:
        sources = [path for split in SPLITS for path in paths_of(config.data, split) or []]
        check_place(run_dir, "trainer.run_dir", sources)
        if states is not None and "://" not in states:
            check_place(Path(states), "trainer.checkpoint.folder", sources)
    except ConfigError as error:
        return str(error)
    return None


def _states_elsewhere(config: Config, *, may_go_on: bool) -> str | None:
    """Return the problem with `trainer.checkpoint.folder`, at start and not at the first save; else None. A new run
    removes old states of its folder, which must not be those of another run."""
    folder = config.trainer.checkpoint.folder
    if folder is None:
        return None
    try:
        if bucket := missing_bucket(folder):
            return f"trainer.checkpoint.folder {folder}: there is no bucket {bucket}"
        found = names_of_states(Storage(folder))
    except (OSError, ConfigError) as error:
        return f"trainer.checkpoint.folder {folder} cannot be read: {' '.join(str(error).split())}"
    if found and not may_go_on:
        return (
            f"trainer.checkpoint.folder {folder} holds {found[0]} of another run; expected a folder without states, so "
            "that two runs never mix (trainer.resume=auto goes on with it)"
        )
    return None


def _make(path: Path, key: str, *, may_go_on: bool) -> str | None:
    """Make the folder; what is wrong with it, or None."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not any(path.iterdir()):
            return None
    except OSError as error:
        return f"{key} {path} cannot be made: {error.strerror}"
    if not may_go_on:
        return None if nothing_trained(path) else _not_empty(path, key)
    if not any((path / name).exists() for name in ("config.yaml", "checkpoints", LOCK)):
        return f"{key} {path} is not empty and holds no run that could go on"
    return None


def _not_empty(path: Path, key: str) -> str:
    return (
        f"{key} {path} is not empty; expected a new folder, so that two runs never mix "
        "(trainer.resume=auto goes on with a run)"
    )


def nothing_trained(path: Path) -> bool:
    """Return whether a folder is that of a run which ended before anything was trained, on bad data for example: a run
    may begin there as in a new one. Anything that a run does not write at its start keeps the folder as it is."""
    names = {one.name for one in path.iterdir()}
    if LOCK not in names or not names <= {LOCK, *AT_START, *FOLDERS_AT_START}:
        return False
    metrics, states = path / "metrics.jsonl", path / "checkpoints"
    logged = metrics.exists() and metrics.stat().st_size > 0
    foreign = [one for one in path.glob("tensorboard/*") if not one.name.startswith("events.out.tfevents.")]
    return not logged and not foreign and not any(states.glob("*"))


def _begin_again(path: Path) -> str | None:
    """With the folder's lock held, remove what a run without any training left. What is wrong with it, or None:
    another job may have trained here since it was looked at."""
    if not nothing_trained(path):
        return _not_empty(path, "trainer.run_dir")
    for name in AT_START:
        (path / name).unlink(missing_ok=True)
    for name in FOLDERS_AT_START:
        shutil.rmtree(path / name, ignore_errors=True)
    return None
