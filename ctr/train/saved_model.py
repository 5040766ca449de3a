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
    dcp.save({"model": model.state_dict()}, checkpoint_id=temporary)
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
    state = model.state_dict()
    dcp.load({"model": state}, checkpoint_id=source)
    model.load_state_dict(state)
    dist.barrier()
