"""The reader's side of publications: a copy of the newest model, brought up to date by what has changed."""

from __future__ import annotations

import os
from pathlib import Path

from tessera.ctr.daily.latest import OF_A_MODEL, read_latest
from tessera.ctr.output_folders import check_place, check_target, foreign_file
from tessera.distributed.folder_lock import FolderLock
from tessera.distributed.rank import Process
from tessera.distributed.saved.compact import save_merged
from tessera.distributed.saved.manifest import MANIFEST, TRAINING, CheckpointError, read_manifest
from tessera.distributed.saved.states import PARTIAL, REPLACED, Saved, open_saved
from tessera.distributed.saved.storage import Storage
from tessera.embedding.errors import ConfigError

KEY = "OUTPUT"
COMMAND = "apply_delta.py"
APPLIED = "applied"  # key of the link to the publication that a served model equals
ATTEMPTS = 3  # while a run publishes and removes what is old


def apply(published: str, output: Path, process: Process, wait_seconds: float = 0.0) -> str:
    """Bring the whole model in `output` up to what `latest` names; return a line that says how.

    What is in `output` is checked, also where it is up to date. Changes behind it are applied to it; where that cannot
    be, because it is damaged or of another chain, it is made from the last whole publication. It is replaced in one
    step, so a kill at any moment leaves the old or the new model.

    Args:
        published: `published` of a run, a local folder or URI. wait_seconds: for another one that brings `output` up.

    Raises:
        CheckpointError: what is published is missing, changed or damaged; `output` is as it was.
        ConfigError: `output` is something else than an earlier result. FolderInUse: another one brings it up.
    """
    if process.world_size > 1:
        raise ConfigError(f"{COMMAND} is one process; found {process.world_size} ranks")
    root, output = Storage(published), Path(os.path.abspath(output.expanduser()))
    read_latest(root)
    check_place(output, KEY, [published])
    check_target(output, KEY, is_served)
    output = Path(os.path.realpath(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(output, wait_seconds, output.with_name(f".{output.name}.lock"))
    except OSError as error:
        raise ConfigError(f"{KEY} {output} cannot be made: {error.strerror}") from None
    try:
        _settle(Storage(output.parent), output.name)
        check_target(output, KEY, is_served)
        return _bring_up(root, output, process)
    except OSError as error:
        raise CheckpointError(f"{KEY} {output} cannot be written: {error.strerror or error}") from None
    finally:
        lock.release()


def is_served(folder: Path) -> str | None:
    """Why a folder is not one that `apply` made, or holds files of others; None where it is. It may be damaged."""
    storage = Storage(folder)
    try:
        manifest = read_manifest(storage)
        own = {MANIFEST, *manifest["files"]}
    except CheckpointError:
        manifest, own = {}, {path for path in storage.all_files() if OF_A_MODEL.fullmatch(path)}
    # One of two files may be damaged.
    known = APPLIED in manifest or any(_holds(folder / name, f'"{APPLIED}"') for name in (MANIFEST, TRAINING))
    if not known:
        return f"it holds {min(os.listdir(folder))} and is no model that {COMMAND} wrote"
    return foreign_file(folder, own, COMMAND)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and text.encode() in path.read_bytes()


def _settle(parent: Storage, name: str) -> None:
    """Put back or remove what a call that was killed has left. Only for who holds the lock of that name."""
    parent.remove(f"{PARTIAL}{name}")
    if parent.exists(name):
        parent.remove(f"{REPLACED}{name}")
    elif parent.exists(f"{REPLACED}{name}"):
        parent.rename(f"{REPLACED}{name}", name)


def _bring_up(root: Storage, output: Path, process: Process) -> str:
    links = list(reversed(read_latest(root)["chain"]))
    target, problem = _open_target(output, process) if _holds_something(output) else (None, None)
    had = None if target is None else target.manifest.get(APPLIED)
    if had == links[0]:
        return f"{output} is {links[0]['name']} already"
    saved, links = _open_published(root, process)
    folders, start = saved.folders, "the whole model"
    if target is not None and had in links:
        place = links.index(had)
        folders, start = [*folders[:place], *target.folders], links[place]["name"]
    source = Saved(folders, saved.manifest, saved.training)
    save_merged(Storage(output.parent), output.name, source, process, "model", {APPLIED: links[0]})
    line = f"{output} is {links[0]['name']} now: {start} and {len(folders) - 1} publication(s) of changes behind it"
    return f"{line}; what was there was damaged and is rebuilt: {problem}" if problem else line


def _open_published(root: Storage, process: Process) -> tuple[Saved, list[dict[str, str]]]:
    """The publication that `latest` names with all that it builds on, checked, and the links to them, newest first.

    A run may publish and remove what is old meanwhile: then it is tried again.
    """
    for attempt in range(ATTEMPTS):
        latest = read_latest(root)
        links, folder = list(reversed(latest["chain"])), root.below(latest["partition"])
        try:
            saved = open_saved(folder, process)
            found = [*saved.manifest["chain"], {"name": folder.base_name, "checksum": saved.manifest["checksum"]}]
            if found != latest["chain"]:
                raise CheckpointError(f"{folder.name} is not the one that latest names")
            return saved, links
        except CheckpointError as error:
            if attempt + 1 == ATTEMPTS or read_latest(root) == latest:
                hint = "remove it and start the run's `tessera daily` again, which publishes anew"
                raise CheckpointError(f"{error}; {hint}") from None
    raise AssertionError


def _holds_something(output: Path) -> bool:
    return output.is_dir() and any(output.iterdir())


def _open_target(output: Path, process: Process) -> tuple[Saved | None, str | None]:
    """Return the state that is served, after checking it; or None and what is wrong with it."""
    try:
        return open_saved(Storage(output), process), None
    except CheckpointError as error:
        return None, str(error).removeprefix(f"{output} is passed over: ")
