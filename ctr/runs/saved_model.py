"""A model alone, without what training needs beside it: `best/` in a run folder, in the form of a saved state."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.distributed.rank import Process
from tessera.distributed.saved.dense import load_into, load_tensors, save_tensors, tensor_shapes
from tessera.distributed.saved.manifest import MANIFEST, CheckpointError, read_manifest
from tessera.distributed.saved.row_files import rows_of
from tessera.distributed.saved.states import REPLACED, DamagedState, Saved, open_saved, save
from tessera.distributed.saved.storage import Sealed, Storage, seal
from tessera.distributed.saved.tables import TableParts, describe_tables, load_rows
from tessera.distributed.tables import as_dynamic, owned_tables
from tessera.embedding.errors import TesseraError


def save_model(model: DistributedModelParallel, folder: Path, process: Process, step: int) -> None:
    """Replace `folder` by this model, so that it always holds one complete model.

    Raises CheckpointError: it cannot be written; the model before is still there.
    """
    process.stage = f"saving {folder.name}"
    network = model.module
    tables = owned_tables(network.tables)

    def write(storage: Storage) -> dict[str, Any]:
        tower = {f"tower/{name}": value for name, value in network.tower.state_dict().items()}
        save_tensors(storage, tower | _weights(network.tables.tensors()), process)
        rows = {("rows", name): rows_of(table, leave_out=("state", "row", "period")) for name, table in tables.items()}
        TableParts(rows, {}).write(storage, process)
        return {}

    save(
        Storage(folder.parent),
        folder.name,
        write,
        lambda *_: {"tables": describe_tables(tables)},
        process,
        step=step,
        kind="model",
    )


def has_model(folder: Path) -> bool:
    """Return whether `load_model` would find a model there."""
    return folder.exists() or replaced(folder).exists()


def replaced(folder: Path) -> Path:
    """Return the place where `save` keeps the earlier model while the new one replaces it."""
    return folder.with_name(f"{REPLACED}{folder.name}")


def load_model(model: DistributedModelParallel, folder: Path, process: Process) -> int:
    """Fill `model` from what `save_model` wrote, on any number of ranks. Return the step that it is of.

    Raises:
        TesseraError: no complete model there, or one of another shape.
    """
    if not folder.exists() and replaced(folder).exists():  # killed between two renames
        folder = replaced(folder)
    if not folder.exists():
        raise TesseraError(f"{folder} holds no saved model; train the run first")
    process.stage = f"loading {folder.name}"
    saved = open_saved(Storage(folder), process, rows_later=True)
    fill_model(model, saved, process, in_place=False)
    return saved.step


def fill_model(model: DistributedModelParallel, saved: Saved, process: Process, *, in_place: bool) -> None:
    """Dense weights, static tables and rows of a state that fits the model exactly.

    in_place: rows keep their numbers, for the same ranks to go on.

    Raises:
        CheckpointError: it does not fit; the model is as before.
        DamagedState: rows are not those that were saved; the tables are empty, all else is as before.
    """
    network = model.module
    there, tower, shards = tensor_shapes(saved.folders[0]), network.tower.state_dict(), network.tables.tensors()
    if saved.manifest["kind"] == "model":
        shards = _weights(shards)
    wanted = {f"tower/{name}": value for name, value in tower.items()} | shards
    for name, value in wanted.items():
        shape = there.get(name, ("nothing", ""))[0]
        if shape != value.size():
            expected = _shape(value.size())
            raise CheckpointError(f"{saved.name}: found {_shape(shape)} for {name}; the model has {expected}")
    extra = [n for n in there if n.startswith(("tower/", "tables/")) and n not in wanted]
    if extra:
        hint = "trainer.warm_start takes what fits"
        raise CheckpointError(f"{saved.name} holds {extra[0]}, which the model lacks; {hint}")
    dynamic = as_dynamic(network.tables)
    if dynamic:
        dynamic.clear()
    try:
        load_rows(owned_tables(network.tables), saved, process, in_place=in_place)
    except DamagedState:
        if dynamic:
            dynamic.clear()
        raise
    found = load_tensors(saved.folders[0], lambda name: name.startswith("tower/"))
    network.tower.load_state_dict({name.removeprefix("tower/"): value for name, value in found.items()})
    if shards:
        load_into(saved.folders[0], shards)


def _weights(shards: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in shards.items() if name.startswith("tables/")}


def _shape(size: Any) -> str:
    return size if isinstance(size, str) else str(list(size))


def link_model(folder: Path, new: Path) -> None:
    """Keep the model of a folder under another name too; it takes no space where the disk can link files."""
    shutil.rmtree(new, ignore_errors=True)
    source, target = Storage(folder), Storage(new)
    for path in [*read_manifest(source)["files"], MANIFEST]:
        target.link_or_copy(source, path, path)


def put_into(storage: Storage, below: str, folder: Path) -> None:
    """Move what `link_model` kept into a state that is being written."""
    source = Storage(folder)
    manifest = read_manifest(source)
    sealed = {path: Sealed(**one) for path, one in manifest["files"].items()}
    sealed[MANIFEST] = seal(source.read(MANIFEST))
    for path, one in sealed.items():
        storage.link_or_copy(source, path, f"{below}/{path}")
        storage.written[f"{below}/{path}"] = one
    shutil.rmtree(folder)


def take_out(saved: Saved, below: str, folder: Path) -> None:
    """Put the model that a state holds in its place; if it holds none, none stays there."""
    shutil.rmtree(folder, ignore_errors=True)
    state, target = saved.folders[0], Storage(folder)
    for path in saved.manifest["files"]:
        if path.startswith(f"{below}/"):
            target.link_or_copy(state, path, path.removeprefix(f"{below}/"))
