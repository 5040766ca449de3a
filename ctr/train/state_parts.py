"""Define the parts of a saved state: named parts of a run. Each gives its state, and takes it over again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.metrics.windowed import WindowedRates
from tessera.ctr.runs.saved_model import fill_model, link_model, take_out
from tessera.distributed.rank import Process
from tessera.distributed.saved.dense import Tensors, load_tensors
from tessera.distributed.saved.row_files import ColumnSource
from tessera.distributed.saved.states import Saved
from tessera.distributed.saved.tables import describe_tables, load_pending, load_table_state
from tessera.distributed.tables import owned_tables

BEST, STAGED_BEST = "best", ".best-of-save"


@dataclass
class PartState:
    """The content of one part in a saved state.

    Attributes:
        training: keys of training.json: plain numbers and strings, the same on all ranks.
        of_rank: plain numbers and strings of this rank alone, in training.json too.
        tensors: by their names in the state; all ranks hold the same, or shards of it.
        rank_tensors: those of this rank alone.
        files: ids that are saved beside the rows of tables: (kind, table) -> columns.
        folders: name in the state -> a folder that moves there when the state is written.
        keep: names of other states that are kept besides the newest ones.
    """

    training: dict[str, Any] = field(default_factory=dict)
    of_rank: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    rank_tensors: dict[str, Tensor] = field(default_factory=dict)
    files: dict[tuple[str, str], ColumnSource] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    keep: set[str] = field(default_factory=set)


@dataclass
class FoundState:
    """A saved state that a run goes on from.

    Attributes:
        is_own: it is of this run's folder, not of another one that `trainer.resume` names.
        optimizer: tensors of the dense optimizer, parameter/name -> tensor.
        by_rank: `rank_tensors` of each rank that has saved it.
        warn: says a line about what cannot be taken over.
    """

    saved: Saved
    process: Process
    is_own: bool
    optimizer: Tensors
    by_rank: list[dict[str, Tensor]]
    warn: Callable[[str], None]

    @property
    def training(self) -> dict[str, Any]:
        """The `training` of all parts, and `of_ranks`, a list of their `of_rank`."""
        return self.saved.training

    @property
    def same_ranks(self) -> bool:
        """True if the number of ranks is that of the save."""
        return self.saved.ranks == self.process.world_size

    @property
    def rank_tensors(self) -> dict[str, Tensor]:
        """The tensors of this rank or, if there were fewer ranks, of another one."""
        return self.by_rank[self.process.rank % len(self.by_rank)]

    def take_sums(self, name: str, sums: Tensor) -> None:
        """Fill a tensor that each rank sums for itself; on another number of ranks rank 0 takes the whole sum."""
        if name in self.rank_tensors:
            whole = torch.stack([one[name] for one in self.by_rank]).sum(0)
            sums.copy_(self.rank_tensors[name] if self.same_ranks else whole * self.process.is_main)


class Stateful(Protocol):
    """A part of a run that lives on in its saved states."""

    def state(self) -> PartState:
        """Return the state as it is now. What it refers to may change before it is written, but for `tensors` and
        `rank_tensors`, which are copied at once."""

    def load(self, found: FoundState) -> None:
        """Take over what `state` gave when the state was saved, maybe on another number of ranks."""


def state_of(parts: Iterable[Stateful]) -> PartState:
    """Return the states of all parts as one."""
    whole = PartState()
    for part in parts:
        for name, value in vars(part.state()).items():
            getattr(whole, name).update(value)
    return whole


def find_parts(saved: Saved, process: Process, *, is_own: bool, warn: Callable[[str], None]) -> FoundState:
    """Read what the parts of a run ask for in `load`, but for the model and its tables."""
    tensors = load_tensors(saved.folders[0], lambda name: name.startswith(("rank/", "optimizer/")))
    by_rank = [_below(tensors, f"rank/{rank}/") for rank in range(saved.ranks)]
    return FoundState(saved, process, is_own, _below(tensors, "optimizer/"), by_rank, warn)


def _below(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class ModelState:
    """The tower and its buffers, static tables, and what the rows of dynamic tables are made of. The rows themselves
    are no part: `Checkpoints` writes only those that have changed."""

    def __init__(self, model: DistributedModelParallel, process: Process) -> None:
        self._model, self._process = model, process

    def state(self) -> PartState:
        network = self._model.module
        tower, tables = network.tower, network.tables
        return PartState(
            training={"tables": describe_tables(owned_tables(tables))},
            tensors={f"tower/{name}": value for name, value in tower.state_dict().items()} | tables.tensors(),
            rank_tensors={f"buffer/{name}": value for name, value in tower.named_buffers()},
        )

    def load(self, found: FoundState) -> None:
        """Take over rows, too.

        Raises:
            CheckpointError: it does not fit; the model is as before.
            DamagedState: rows are not those that were saved; the tables are empty, all else is as before.
        """
        network, saved = self._model.module, found.saved
        fill_model(self._model, saved, self._process, in_place=found.same_ranks)
        owned = owned_tables(network.tables)
        load_pending(owned, saved, self._process)
        for line in load_table_state(owned, saved, found.by_rank, self._process):
            found.warn(line)
        for name, buffer in network.tower.named_buffers():
            buffer.copy_(found.rank_tensors[f"buffer/{name}"])


class RandomNumbers:
    """torch's generators of this rank."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def state(self) -> PartState:
        found = {"rng": torch.get_rng_state()}
        if self._process.device.type == "cuda":
            found["cuda_rng"] = torch.cuda.get_rng_state(self._process.device)
        return PartState(rank_tensors=found)

    def load(self, found: FoundState) -> None:
        rank, device = self._process.rank, self._process.device
        if rank < len(found.by_rank):
            torch.set_rng_state(found.rank_tensors["rng"])
            if "cuda_rng" in found.rank_tensors and device.type == "cuda":
                torch.cuda.set_rng_state(found.rank_tensors["cuda_rng"], device)
        else:  # two ranks must not draw the same numbers
            torch.manual_seed(torch.initial_seed() + found.training["progress"]["step"] * 65536 + rank)


class Rates:
    """What was predicted since the last log line, `WindowedRates`."""

    def __init__(self, rates: WindowedRates) -> None:
        self._rates = rates

    def state(self) -> PartState:
        return PartState(rank_tensors={"rates": self._rates.make_sums()})

    def load(self, found: FoundState) -> None:
        found.take_sums("rates", self._rates.sums)


class BestModel:
    """The best model so far, `best/` in the run folder. Rank 0 keeps it."""

    def __init__(self, run_dir: Path, process: Process) -> None:
        self._folder, self._staged, self._process = run_dir / BEST, run_dir / STAGED_BEST, process

    def state(self) -> PartState:
        if not self._process.is_main or not self._folder.exists():
            return PartState()
        link_model(self._folder, self._staged)  # a better one may come before the state is written
        return PartState(folders={BEST: self._staged})

    def load(self, found: FoundState) -> None:
        if self._process.is_main:
            take_out(found.saved, BEST, self._folder)
