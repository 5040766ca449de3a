"""Saved states of a training run: what is in them, when they are written, and how a run goes on from one.

A state is one moment between two steps: dense weights and their optimizer, rows and all else that tables are, the
reader's position, random numbers, counters of log and early stopping, the best model so far, the configuration. It is
taken in memory, and a thread writes it while training goes on.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from tessera.ctr.train.saved_model import fill_model, link_model, put_into, take_out
from tessera.ctr.train.saved_training import as_written, changed_keys, check_goes_on
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.distributed.plan import size
from tessera.distributed.process import Process, Stopped
from tessera.distributed.saved.dense import Tensors, copy_of, load_tensors, save_tensors
from tessera.distributed.saved.manifest import MANIFEST, CheckpointError
from tessera.distributed.saved.states import (
    DamagedState,
    Saved,
    clean,
    folder_name,
    has_states,
    open_saved,
    retain,
    save,
    states,
)
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import (
    TableParts,
    TableSaver,
    describe_tables,
    load_table_state,
    load_waiting,
)
from tessera.distributed.saved.watch import SaveWatch
from tessera.distributed.tables import owned_tables

if TYPE_CHECKING:
    from tessera.ctr.train.trainer import Trainer

PROGRESS = ("step", "epoch", "now", "best", "evaluations_since_best", "evaluated_step")
BEST, STAGED_BEST = "best", ".best-of-save"
MEMORY_SHARE = 0.7  # of the free memory, at most, for copies of rows


@dataclass
class Moment:
    """This rank's part of a state, as it was at `step`."""

    step: int
    kind: str
    tensors: Tensors
    tables: TableParts
    training: dict[str, Any]
    keep: set[str]
    of_rank: dict[str, Any]


class Checkpoints:
    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._config, self._process = trainer, trainer.config.trainer.checkpoint, trainer.process
        folder = self._config.folder or str(trainer.log.folder / "checkpoints")
        self._watch = SaveWatch(self._process, trainer.config.trainer.timeout_seconds)
        self.root = Storage(folder, self._watch.note)
        self._tables = TableSaver(owned_tables(trainer.tables))
        self._chain: list[dict[str, str]] = []
        self._saved_step: int | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        # The thread agrees with the threads of other ranks while these are in collectives of training. A save may take
        # long; the watch ends it when it stands still.
        several = self._process.world_size > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if several else None

    def after_step(self, save_follows: bool = False) -> None:
        """Save if it is time to; leave if all ranks know that one of them was asked to stop.

        save_follows: the caller will save this step itself.

        Raises:
            CheckpointError: now or in the background a state could not be written.
            Stopped: after a state was saved because of SIGTERM.
        """
        trainer = self._trainer
        if self._pending is not None and self._pending.done():
            self.wait()
        if trainer.stopping:
            self.save()
            self.wait()
            line = f"stopped by {self._process.stopped_by}, state saved; trainer.resume=auto goes on"
            trainer.log.say(f"step {trainer.step} · {line}")
            trainer.log.close()
            raise Stopped(line=f"step {trainer.step}: {line}")
        if self._config.every and trainer.step % self._config.every == 0 and not save_follows:
            self.save()

    def after_epoch(self) -> None:
        if not self._config.every:
            self.save()

    def save(self, again: bool = False) -> None:
        """Take the state as it is now. Waits for the save before this one, if that is still being written.

        again: also if this step is saved already; what has no steps has changed.
        """
        if self._saved_step == self._trainer.step and not again:
            return
        began = time.perf_counter()
        self.wait()
        self._process.stage = f"step {self._trainer.step}: saving"
        overlap = self._config.overlap and self._copy_fits()
        moment = self._take()
        self._saved_step = moment.step
        if overlap:
            self._pending = self._thread.submit(self._write, moment, began, time.perf_counter() - began)
        else:
            self._write(moment, began, None)

    def wait(self) -> None:
        """Until the last save is done. Raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._process.stage = f"step {self._trainer.step}: waiting for a state to be written"
            pending.result()

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _copy_fits(self) -> bool:
        """Whether the host has memory for copies of its ranks' rows, should all change before they are written. Ranks
        may differ: the group's agreement is the same from the thread and from here."""
        needed = sum(table.nbytes for table in owned_tables(self._trainer.tables).values())
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return needed * local_ranks < MEMORY_SHARE * available_memory()

    def _take(self) -> Moment:
        trainer = self._trainer
        delta = 0 < len(self._chain) < self._config.full_every and self._tables.can_follow()
        delta = delta and self._saved_step != trainer.step  # a state does not build on the one that it replaces
        tables = self._tables.take(delta)
        tables.files |= trainer.state_files()
        self._tables.follow(deltas=self._config.full_every > 1)
        best = trainer.log.folder / BEST
        if self._process.is_main and best.exists():
            link_model(best, trainer.log.folder / STAGED_BEST)
        return Moment(
            step=trainer.step,
            kind="delta" if delta else "full",
            tensors=self._tensors(tables),
            tables=tables,
            training=self._training(),
            keep=trainer.states_to_keep(),
            of_rank={"bad_rows": {s: r.bad_row_counts.copy() for s, r in trainer.readers.items() if r is not None}},
        )

    def _tensors(self, tables: TableParts) -> Tensors:
        trainer, rank = self._trainer, self._process.rank
        tower = trainer.model.module.tower
        own = {f"buffer/{name}": value for name, value in tower.named_buffers()}
        own |= {"rng": torch.get_rng_state(), **self._sums()}
        if self._process.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state(self._process.device)
        found: Tensors = {f"rank/{rank}/{name}": value for name, value in (own | tables.state).items()}
        found |= {f"tower/{name}": value for name, value in tower.state_dict().items()}
        found |= {f"optimizer/{name}": value for name, value in trainer.optimizers.state().items()}
        found |= trainer.tables.tensors()
        return {name: copy_of(value) for name, value in found.items()}

    def _training(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "progress": {name: getattr(trainer, name) for name in PROGRESS},
            "schedule": {"steps": trainer.optimizers.steps, "factor": trainer.optimizers.factor},
            **trainer.state(),
            "log": trainer.log.state(),
            "distil": trainer.distil.state() if trainer.distil else None,
            "tables": describe_tables(owned_tables(trainer.tables)),
            "config": OmegaConf.to_container(OmegaConf.structured(trainer.config), resolve=True),
        }

    def _write(self, moment: Moment, began: float, waited: float | None) -> None:
        """In the thread, or (waited: None) while training waits."""
        with self._watch.watching(folder_name(moment.step)):
            manifest = self._write_watched(moment)
        seconds = time.perf_counter() - began
        total = sum(file["bytes"] for file in manifest["files"].values())
        what = "" if moment.kind == "full" else " (changes)"
        stall = f", training waited {seconds if waited is None else waited:.2f} s"
        self._trainer.log.say(f"step {moment.step} · saved {size(total)}{what} in {seconds:.1f} s{stall}")

    def _write_watched(self, moment: Moment) -> dict[str, Any]:
        """All ranks' files, the manifest, and older states removed. Returns the manifest."""
        trainer = self._trainer

        def write(storage: Storage) -> dict[str, Any]:
            save_tensors(storage, moment.tensors, self._process)
            moment.tables.write(storage, self._process)
            return moment.of_rank

        def describe(storage: Storage, of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
            staged = trainer.log.folder / STAGED_BEST
            if staged.exists():
                put_into(storage, BEST, staged)
            trainer.log.sync()
            return moment.training | {"of_ranks": of_ranks}

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
            retain(self.root, self._config.keep, moment.keep)
        return manifest

    def forget_tables(self) -> None:
        """The live tables are new ones: the next state is full."""
        self.wait()
        self._tables, self._chain = TableSaver(owned_tables(self._trainer.tables)), []

    def resume(self) -> bool:
        """Go on from the newest state of this run, or from the one that trainer.resume names. False: there is none.

        Raises:
            CheckpointError: there are states of this run, and none of them can be read; or the one that is named
                cannot be read, or does not fit the model.
            DataError: the data are not those of the state.
        """
        trainer, process, problems = self._trainer, self._process, []
        if not trainer.log.may_go_on:
            return False
        on_first_rank(process, self._clean)
        for saved, own in self._to_go_on_from(problems):
            process.stage = f"loading {saved.name}"
            try:
                self._restore(saved, own)
                break
            except DamagedState as error:
                problems.append(str(error))
                trainer.log.warn(problems[-1])
                self._tables = TableSaver(owned_tables(trainer.tables))
        else:
            return False
        trainer.log.say(f"step {trainer.step} · goes on from {saved.name}, saved by {saved.ranks} rank(s)")
        for line in changed_keys(saved.training["config"], trainer.config):
            trainer.log.say(f"configuration: {line}")
        return True

    def _clean(self) -> None:
        """Remove what killed saves have left half written here and in the run folder, whose lock this job holds."""
        folder = self._trainer.log.folder
        try:
            clean(self.root)
            clean(Storage(folder))
            shutil.rmtree(folder / STAGED_BEST, ignore_errors=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: what a killed save left cannot be removed: {error.strerror}") from None

    def _to_go_on_from(self, problems: list[str]) -> Iterator[tuple[Saved, bool]]:
        """States, the best first, and whether they are of this run. Their rows are still to be checked.

        problems: what is wrong with states that were passed over; more is added here.

        Raises CheckpointError: this run has states, and none of them can be read. To begin anew would put them aside.
        """
        process, named = self._process, self._trainer.config.trainer.resume

        def warn(problem: str) -> None:
            problems.append(problem)
            self._trainer.log.warn(problem)

        yield from ((saved, True) for saved in states(self.root, process, warn, rows_later=True))
        if has_states(self.root, process):
            raise CheckpointError(
                f"none of the states in {self.root.name} can be read, nothing is trained ({'; '.join(problems)}); "
                "to begin anew on purpose, move that folder away or name another trainer.run_dir"
            )
        if named not in (None, "auto"):
            yield from ((saved, False) for saved in _states_at(named, process, warn, rows_later=True))

    def _restore(self, saved: Saved, own: bool) -> None:
        check_goes_on(saved, self._trainer)
        with as_written(saved):
            self._take_over(saved, own)
        if own:
            self._saved_step = saved.step
        wait_for_all()

    def _take_over(self, saved: Saved, own: bool) -> None:
        trainer, process, training = self._trainer, self._process, saved.training
        same_ranks = saved.ranks == process.world_size
        fill_model(trainer.model, saved, process, in_place=same_ranks)
        self._tables = TableSaver(owned_tables(trainer.tables))
        load_waiting(owned_tables(trainer.tables), saved, process)
        tensors = load_tensors(saved.folders[0], lambda name: name.startswith(("rank/", "optimizer/")))
        by_rank = [_below(tensors, f"rank/{rank}/") for rank in range(saved.ranks)]
        for line in load_table_state(owned_tables(trainer.tables), saved, by_rank, process):
            trainer.log.warn(line)
        trainer.optimizers.load_state(_below(tensors, "optimizer/"), **training["schedule"])
        trainer.load_state(saved)
        self._restore_rank(by_rank, same_ranks, training)
        for name in PROGRESS:
            setattr(trainer, name, training["progress"][name])
        if trainer.distil and training["distil"]:
            trainer.distil.load_state(training["distil"])
        trainer.log.begin(trainer.step, training["log"] if own else None)
        if process.is_main:
            take_out(saved, BEST, trainer.log.folder / BEST)

    def _sums(self) -> dict[str, torch.Tensor]:
        """What each rank sums over steps: that since the last log line, and that of the epoch."""
        trainer = self._trainer
        return {"sums": trainer.log.sums} | ({"distil_sums": trainer.distil.sums} if trainer.distil else {})

    def _restore_rank(self, by_rank: list[dict[str, torch.Tensor]], same_ranks: bool, training: dict) -> None:
        """What each rank has of its own. On another number of ranks, rank 0 takes what is summed over ranks."""
        trainer, rank = self._trainer, self._process.rank
        own = by_rank[rank % len(by_rank)]
        for name, buffer in trainer.model.module.tower.named_buffers():
            buffer.copy_(own[f"buffer/{name}"])
        if rank < len(by_rank):
            torch.set_rng_state(own["rng"])
            if "cuda_rng" in own and self._process.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_rng"], self._process.device)
        else:  # two ranks must not draw the same numbers
            torch.manual_seed(torch.initial_seed() + training["progress"]["step"] * 65536 + rank)
        bad_rows = [one["bad_rows"] for one in training["of_ranks"]]
        for name, sums in self._sums().items():
            if name in own:
                every = torch.stack([one[name] for one in by_rank])
                sums.copy_(own[name] if same_ranks else every.sum(0) * (rank == 0))
        mine = bad_rows[rank : rank + 1] if same_ranks else bad_rows[: len(bad_rows) * (rank == 0)]
        for counts in mine:
            for split, reader in trainer.readers.items():
                for reason, count in counts.get(split, {}).items() if reader is not None else ():
                    reader.bad_row_counts[reason] = reader.bad_row_counts.get(reason, 0) + count


def available_memory() -> float:
    """Bytes of host memory that can be had without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def find_saved(path: str, process: Process, warn: Callable[[str], None]) -> Saved:
    """The state that a folder is, or the newest below it; also below `checkpoints` in a run's folder.

    Raises CheckpointError: there is none that can be read.
    """
    return next(_states_at(path, process, warn))


def _states_at(path: str, process: Process, warn: Callable[[str], None], rows_later: bool = False) -> Iterator[Saved]:
    """Those of `find_saved`, in order; behind the last one CheckpointError."""
    folder = Storage(path)
    if folder.exists(MANIFEST):
        yield open_saved(folder, process, rows_later)
    else:
        for root in (folder, folder.below("checkpoints")):
            yield from states(root, process, warn, rows_later)
    raise CheckpointError(f"{path} holds no saved state that can be read; expected a state's folder or a run's")


def _below(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
