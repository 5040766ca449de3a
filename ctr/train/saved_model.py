"""Save and load a model's weights, dense and sharded, by torch.distributed.checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel

from distributed.process import Process
from embedding.errors import TesseraError


def save_model(model: DistributedModelParallel, folder: Path, process: Process) -> None:
    """Write to a temporary folder and rename it, so that `folder` always holds one complete model."""
    temporary, previous = folder.with_suffix(".partial"), folder.with_suffix(".previous")
    process.stage = f"saving {folder.name}"
    if process.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    network = model.module
    dcp.save({"tower": network.tower.state_dict(), "tables": network.tables.state()}, checkpoint_id=temporary)
    network.tables.save_rows(temporary / "rows", process)
    dist.barrier()
    if process.is_main:
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    dist.barrier()


def load_model(model: DistributedModelParallel, folder: Path, process: Process) -> None:
    """Fill `model` from what `save_model` wrote, on any number of ranks.

    Raises:
        TesseraError: no complete model there.
    """
    previous = folder.with_suffix(".previous")
    source = folder if folder.exists() or not previous.exists() else previous  # killed between the two renames
    if not (source / ".metadata").exists():
        raise TesseraError(f"{folder} holds no saved model; train the run first")
    process.stage = f"loading {folder.name}"
    network = model.module
    tower, tables = network.tower.state_dict(), network.tables.state()
    dcp.load({"tower": tower, "tables": tables}, checkpoint_id=source)
    network.tower.load_state_dict(tower)
    network.tables.load_state(tables)
    network.tables.load_rows(source / "rows", process)
    dist.barrier()
