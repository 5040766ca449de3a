"""When saved states of a run are written, and how it goes on from one.

A state is one moment between two steps: all parts of the run (ctr/train/state_parts.py) and the rows of its tables. It
is taken in memory, and a thread writes it while training goes on.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tessera.ctr.runs.log import RunLog
from tessera.ctr.runs.saved_model import put_into
from tessera.ctr.train.check_state import as_written, changed_keys, check_goes_on
from tessera.ctr.train.engine import Engine
from tessera.ctr.train.find_state import states_to_go_on_from
from tessera.ctr.train.state_parts import STAGED_BEST, PartState, Stateful, find_parts, state_of
from tessera.ctr.train.warm_start import warm_start
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.distributed.plan import size
from tessera.distributed.process import Stopped
from tessera.distributed.saved.dense import Tensors, copy_of, save_tensors
from tessera.distributed.saved.manifest import CheckpointError
from tessera.distributed.saved.states import DamagedState, Saved, clean, folder_name, retain, save
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableParts, TableSaver
from tessera.distributed.saved.watch import SaveWatch
from tessera.distributed.tables import owned_tables
from tessera.kernels import backend

MEMORY_SHARE = 0.7  # of the free memory, at most, for copies of rows


@dataclass
class Moment:
    """This rank's part of a state, as it was at `step`: `parts`, copies of their tensors, and rows of tables."""

    step: int
    kind: str
    parts: PartState
    tensors: Tensors
    tables: TableParts


class Checkpoints:
    """Saves and restores the parts of a run.

    Args:
        engine: whose tables are saved. log: says what happened; its folder is the run's.
        parts: name -> part. They are restored in this order.
        command: the script whose states these are; another one cannot go on from them.
    """

    def __init__(self, engine: Engine, log: RunLog, parts: Mapping[str, Stateful], command: str) -> None:
        self._engine, self._log, self._parts, self._command = engine, log, parts, command
        self._config, self._process = engine.config.trainer.checkpoint, engine.process
        folder = self._config.folder or str(log.folder / "checkpoints")
        self._watch = SaveWatch(self._process, engine.config.trainer.timeout_seconds)
        self.root = Storage(folder, self._watch.note)
        self._tables = TableSaver(owned_tables(engine.tables))
        self._chain: list[dict[str, str]] = []
        self._saved_step: int | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        # The thread agrees with the threads of other ranks while these are in collectives of training. A save may take
        # long; the watch ends it when it stands still.
        several = self._process.world_size > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if several else None

    def begin(self) -> None:
        """Go on from the newest state, or begin, with what another run has learnt if so configured."""
        if not self.resume():
            self._log.begin(0, None)
            if self._engine.config.trainer.warm_start.path is not None:
                warm_start(self._engine, self._log)

    def after_step(self, *, save_follows: bool = False) -> None:
        """Save if it is time to; leave if all ranks know that one of them was asked to stop.

        save_follows: the caller will save this step itself.

        Raises:
            CheckpointError: now or in the background a state could not be written.
            Stopped: after a state was saved because of SIGTERM.
        """
        step = self._engine.step
        if self._pending is not None and self._pending.done():
            self.wait()
        if self._engine.pipeline.stopping:
            self.save()
            self.wait()
            line = f"stopped by {self._process.stopped_by}, state saved; trainer.resume=auto goes on"
            self._log.say(f"step {step} · {line}")
            self._log.close()
            raise Stopped(line=f"step {step}: {line}")
        if self._config.every and step % self._config.every == 0 and not save_follows:
            self.save()

    def after_epoch(self) -> None:
        if not self._config.every:
            self.save()

    def save(self, *, again: bool = False) -> None:
        """Take the state as it is now. Waits for the save before this one, if that is still being written.

        again: also if this step is saved already; what has no steps has changed.
        """
        if self._saved_step == self._engine.step and not again:
            return
        began = time.perf_counter()
        self.wait()
        self._process.stage = f"step {self._engine.step}: saving"
        backend.check(self._process.device)  # a state that a kernel has spoilt must not take the place of a good one
        overlap = self._config.overlap and self._copy_fits()
        moment = self._take()
        self._saved_step = moment.step
        if overlap:
            self._pending = self._thread.submit(self._write, moment, began, time.perf_counter() - began)
        else:
            self._write(moment, began, None)

    def wait(self) -> None:
        """Wait until the last save is done. Raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._process.stage = f"step {self._engine.step}: waiting for a state to be written"
            pending.result()

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _copy_fits(self) -> bool:
        """Return whether the host has memory for copies of its ranks' rows, if all change before they are written.
        Ranks may differ: the group's agreement is the same from the thread and from here."""
        needed = sum(table.nbytes for table in owned_tables(self._engine.tables).values())
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return needed * local_ranks < MEMORY_SHARE * available_memory()

    def _take(self) -> Moment:
        step = self._engine.step
        delta = 0 < len(self._chain) < self._config.full_every and self._tables.can_follow()
        delta = delta and self._saved_step != step  # a state does not build on the one that it replaces
        tables = self._tables.take(delta=delta)
        parts = state_of(self._parts.values())
        tables.files |= parts.files
        self._tables.follow(deltas=self._config.full_every > 1)
        parts.training = {"distil": None, **parts.training, "config": asdict(self._engine.config)}
        own = {f"rank/{self._process.rank}/{name}": v for name, v in (parts.rank_tensors | tables.state).items()}
        tensors = {name: copy_of(value) for name, value in (own | parts.tensors).items()}
        return Moment(step, "delta" if delta else "full", parts, tensors, tables)

    def _write(self, moment: Moment, began: float, waited: float | None) -> None:
        """Write a state in the thread, or (waited: None) while training waits."""
        with self._watch.watching(folder_name(moment.step)):
            manifest = self._write_watched(moment)
        seconds = time.perf_counter() - began
        total = sum(file["bytes"] for file in manifest["files"].values())
        what = "" if moment.kind == "full" else " (changes)"
        stall = f", training waited {seconds if waited is None else waited:.2f} s"
        self._log.say(f"step {moment.step} · saved {size(total)}{what} in {seconds:.1f} s{stall}")

    def _write_watched(self, moment: Moment) -> dict[str, Any]:
        """Write all ranks' files and the manifest, and remove older states. Returns the manifest."""

        def write(storage: Storage) -> dict[str, Any]:
            save_tensors(storage, moment.tensors, self._process)
            moment.tables.write(storage, self._process)
            return moment.parts.of_rank

        def describe(storage: Storage, of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
            for name, folder in moment.parts.folders.items():
                if folder.exists():
                    put_into(storage, name, folder)
            self._log.sync()
            return moment.parts.training | {"of_ranks": of_ranks}

        chain = self._chain if moment.kind == "delta" else []
        name = folder_name(moment.step)
        manifest = save(
            self.root,
            name,
            write,
            describe,
            self._process,
            self._group,
            step=moment.step,
            kind=moment.kind,
            chain=chain,
        )
        self._chain = [*chain, {"name": name, "checksum": manifest["checksum"]}]
        if self._process.is_main:
            retain(self.root, self._config.keep_last, moment.parts.keep)
        return manifest

    def forget_tables(self) -> None:
        """Make the next state full: the live tables are new ones."""
        self.wait()
        self._tables, self._chain = TableSaver(owned_tables(self._engine.tables)), []

    def resume(self) -> bool:
        """Go on from the newest state of this run, or from the one that trainer.resume names. False: there is none.

        Raises:
            CheckpointError: there are states of this run, and none of them can be read; or the one that is named
                cannot be read, or does not fit the model.
            DataError: the data are not those of the state.
        """
        log, process, config = self._log, self._process, self._engine.config
        problems: list[str] = []
        if not log.may_go_on:
            return False
        on_first_rank(process, self._clean)
        for saved, is_own in states_to_go_on_from(self.root, config.trainer.resume, process, log.warn, problems):
            process.stage = f"loading {saved.name}"
            try:
                self._restore(saved, is_own=is_own)
                break
            except DamagedState as error:
                problems.append(str(error))
                log.warn(problems[-1])
        else:
            return False
        log.say(f"step {saved.step} · goes on from {saved.name}, saved by {saved.ranks} rank(s)")
        for line in changed_keys(saved.training["config"], config):
            log.say(f"configuration: {line}")
        return True

    def _clean(self) -> None:
        """Remove what killed saves have left half written here and in the run folder, whose lock this job holds."""
        folder = self._log.folder
        try:
            clean(self.root)
            clean(Storage(folder))
            shutil.rmtree(folder / STAGED_BEST, ignore_errors=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: what a killed save left cannot be removed: {error.strerror}") from None

    def _restore(self, saved: Saved, *, is_own: bool) -> None:
        check_goes_on(saved, self._command, self._engine.config)
        try:
            with as_written(saved):
                found = find_parts(saved, self._process, is_own=is_own, warn=self._log.warn)
                for part in self._parts.values():
                    part.load(found)
        finally:  # what is in the tables now, or was before they were emptied, no delta can build on
            self._tables = TableSaver(owned_tables(self._engine.tables))
        if is_own:
            self._saved_step = saved.step
        wait_for_all()


def available_memory() -> float:
    """Return the bytes of host memory that can be had without swapping; infinite if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
