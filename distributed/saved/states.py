"""Write, list and open folders that each hold one complete saved state; incomplete ones are passed over.

A state is written under a name that nobody takes for a state; its manifest, with the size and the checksum of every
file, comes last; then all is synced and one rename gives it its name. Behind a URI, where a rename is not atomic, a
folder is a state when its manifest is there. Nothing is ever changed in a finished folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch.distributed as dist

from tessera.distributed.atomic import exchange
from tessera.distributed.collectives import from_first_rank, gather_objects
from tessera.distributed.rank import Process
from tessera.distributed.saved.checked_parquet import problem_but_for_groups
from tessera.distributed.saved.manifest import (
    FORMAT,
    MANIFEST,
    TRAINING,
    CheckpointError,
    SavedFolder,
    checksum,
    files_listed,
    read_manifest,
    read_training,
)
from tessera.distributed.saved.storage import Sealed, Storage
from tessera.distributed.saved.watch import WAITING

NAME = re.compile(r"step-(\d{12})")
PARTIAL, REPLACED, DELETED = ".partial-", ".replaced-", ".deleted-"  # before the names of folders that are no states


class DamagedState(CheckpointError):
    """Rows of an opened state failed their checksum while loading."""


@dataclass(frozen=True)
class Saved:
    """A verified state; `load_rows` checks what is left of its rows (`open_saved`).

    folders: where it lies, newest first: one folder, or a delta and those before it down to the full one. They show
        the files that their manifests list, and no others.
    manifest: of the newest. training: what `save` was given to describe it.
    """

    folders: list[SavedFolder]
    manifest: dict[str, Any]
    training: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folders[0].name

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def ranks(self) -> int:
        return int(self.manifest["world_size"])

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.manifest["files"].values())


def folder_name(step: int) -> str:
    return f"step-{step:012d}"


def save(
    root: Storage,
    name: str,
    write: Callable[[Storage], dict[str, Any]],
    describe: Callable[[Storage, list[dict[str, Any]]], dict[str, Any]],
    process: Process,
    group: dist.ProcessGroup | None = None,
    *,
    step: int = 0,
    kind: str = "full",
    chain: list[dict[str, str]] | None = None,
    world_size: int | None = None,
    notes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write one state by all ranks; it is there completely, or as if nothing had happened.

    Args:
        write: puts this rank's files into the folder it is given and returns what it has to say for `describe`.
        describe: called on rank 0 with what all ranks said, in rank order; may add files; its result is stored.
        group: for the agreement between ranks; one of its own if the caller is not the main thread.
        chain: name and checksum of the states that this one builds on, the full one first.
        world_size: ranks whose files these are, if not the job's.
        notes: further keys of the manifest.

    Returns:
        the manifest.

    Raises:
        CheckpointError: on every rank, naming the rank that failed and why.
    """
    partial = f"{PARTIAL}{name}" if root.local else name
    folder = root.below(partial)
    said: dict[str, Any] = {}
    problem = from_first_rank(_make_room(root, name, partial) if process.is_main else None, group)
    if problem is None:
        try:
            folder.make()
            said = write(folder)
        except OSError as error:
            problem = f"rank {process.rank}: {_reason(error)}"
    root.note(WAITING)
    reports = gather_objects((problem, said, folder.written), group)
    problem = next((report[0] for report in reports if report[0]), None)
    manifest: dict[str, Any] = {}
    if process.is_main:
        if problem is None:
            try:
                head = {"step": step, "kind": kind, "world_size": world_size or process.world_size}
                head |= notes or {}
                manifest = _commit(root, folder, partial, name, reports, describe, head, chain or [])
            except OSError as error:
                problem = f"rank 0: {_reason(error)}"
        if problem is not None:
            _remove_quietly(root, partial)
            if not root.local:
                with suppress(OSError):  # then `clean` does it
                    _put_back(root, name)
    root.note(WAITING)
    problem, manifest = from_first_rank((problem, manifest), group)
    if problem is not None:
        where = root.full(name) if root.local else root.below(name).name
        raise CheckpointError(f"{where} cannot be written: {problem}; what was saved before is untouched")
    return manifest


def _make_room(root: Storage, name: str, partial: str) -> str | None:
    """Remove what a killed save has left where the next one writes; return what is wrong.

    Behind a URI the place is the final one: a state of the same name is copied aside, until the new one is complete.
    """
    try:
        if root.local:
            root.remove(partial)
        elif root.exists(f"{name}/{MANIFEST}"):
            root.remove(f"{REPLACED}{name}")
            _copy_folder(root, name, f"{REPLACED}{name}")
            root.remove(f"{name}/{MANIFEST}")
    except OSError as error:
        return f"rank 0: {_reason(error)}"
    return None


def _put_back(root: Storage, name: str) -> None:
    """Settle a replacement behind a URI: copy the old state that `_make_room` put aside back if there is no complete
    one, and remove it from there."""
    aside = f"{REPLACED}{name}"
    if not root.exists(f"{name}/{MANIFEST}") and root.exists(f"{aside}/{MANIFEST}"):
        root.remove(name)
        _copy_folder(root, aside, name)
    root.remove(f"{aside}/{MANIFEST}")
    root.remove(aside)


def _copy_folder(root: Storage, name: str, new: str) -> None:
    """Copy a state; its manifest comes last."""
    paths = root.below(name).all_files()
    for path in sorted(paths, key=lambda path: path == MANIFEST):
        root.copy(f"{name}/{path}", f"{new}/{path}")


def _commit(
    root: Storage,
    folder: Storage,
    partial: str,
    name: str,
    reports: list[tuple[str | None, dict[str, Any], dict[str, Sealed]]],
    describe: Callable[[Storage, list[dict[str, Any]]], dict[str, Any]],
    head: dict[str, Any],
    chain: list[dict[str, str]],
) -> dict[str, Any]:
    for _, _, written in reports:
        folder.written.update(written)
    training = describe(folder, [said for _, said, _ in reports])
    with folder.write(TRAINING) as stream:
        stream.write(json.dumps(training, indent=1).encode())
    manifest = {
        "format": FORMAT,
        **head,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "chain": chain,
        "files": {path: vars(sealed) for path, sealed in sorted(folder.written.items())},
    }
    manifest["checksum"] = checksum(manifest)
    folder.sync_folders()
    with folder.write(MANIFEST) as stream:
        stream.write(json.dumps(manifest, indent=1).encode())
    if root.local:
        folder.sync_folders()
        if root.exists(name):  # it did not verify, or belongs to steps that are trained again
            root.remove(f"{REPLACED}{name}")
            if exchange(root.full(partial), root.full(name)):  # at no moment there is none of that name
                root.rename(partial, f"{REPLACED}{name}")
            else:
                root.rename(name, f"{REPLACED}{name}")
                root.rename(partial, name)
        else:
            root.rename(partial, name)
        root.sync_folders(below=False)
        root.remove(f"{REPLACED}{name}")
    else:
        for path in SavedFolder(folder, files_listed(manifest)).strays():  # of a killed save, by more ranks perhaps
            folder.remove(path)
        _put_back(root, name)
    return manifest


def _remove_quietly(root: Storage, path: str) -> None:
    """Remove a folder after a failure; on a full or read-only disk this may fail too, and then the first error
    matters."""
    with suppress(OSError):
        root.remove(path)


def _reason(error: Exception) -> str:
    """Return what went wrong as one line: the system's own words where it has any."""
    text = " ".join(str(error).split()) or type(error).__name__
    return getattr(error, "strerror", None) or text


def _chain(folder: Storage, manifest: dict[str, Any]) -> list[tuple[Storage, dict[str, Any]]]:
    """Return the folder and those it builds on with their manifests, newest first."""
    found = [(folder, manifest)]
    for link in reversed(manifest["chain"]):
        earlier = folder.beside(link["name"])
        try:
            one = read_manifest(earlier)
        except CheckpointError as error:
            raise CheckpointError(f"{link['name']}, which it builds on: {error}") from None
        if one["checksum"] != link["checksum"]:
            raise CheckpointError(f"{link['name']}, which it builds on, is not the one that was there")
        found.append((earlier, one))
    return found


def open_saved(folder: Storage, process: Process, *, rows_later: bool = False) -> Saved:
    """Check every file of a state, an equal part on each rank.

    rows_later: not the row groups that `load_rows` checks on its way. So a state is read once and not twice, and
    `load_rows` may raise DamagedState.

    Raises:
        CheckpointError: on every rank; what is wrong.
    """
    problem, chain = None, []
    if process.is_main:
        try:
            chain = [(one.base_name, manifest) for one, manifest in _chain(folder, read_manifest(folder))]
        except CheckpointError as error:
            problem = str(error)
    problem, chain = from_first_rank((problem, chain))
    places = [folder, *(folder.beside(name) for name, _ in chain[1:])] if chain else []
    folders = [SavedFolder(one, files_listed(m)) for one, (_, m) in zip(places, chain, strict=True)]
    training: dict[str, Any] = {}
    if problem is None:
        files = [(one, path, sealed) for one in folders for path, sealed in sorted(one.files.items())]
        mine = files[process.rank :: process.world_size]
        problem = first_problem(next((p for one in mine if (p := _problem(*one, rows_later=rows_later))), None))
    if problem is None:
        try:
            training = read_training(folders[0])
        except CheckpointError as error:
            problem = str(error)
        problem = first_problem(problem)
    if problem is not None:
        raise CheckpointError(f"{folder.name} is passed over: {problem}")
    return Saved(folders, chain[0][1], training)


def _problem(folder: SavedFolder, path: str, sealed: Sealed, *, rows_later: bool) -> str | None:
    if rows_later and path.startswith("rows/"):
        return problem_but_for_groups(folder, path, sealed)
    return folder.problem(path, sealed)


def first_problem(mine: str | None) -> str | None:
    """Return the problem of the first rank that has one, else None. Collective."""
    return next((problem for problem in gather_objects(mine) if problem is not None), None)


def names_of_states(root: Storage) -> list[str]:
    """Return the folders with names of states, newest step first. The clock has no say in it."""
    return sorted((name for name in root.names() if NAME.fullmatch(name)), reverse=True)


def has_states(root: Storage, process: Process) -> bool:
    """Return whether there are states, be they readable or not; the same on all ranks.

    Behind a URI a folder without a manifest is a save that did not end.
    """
    found = process.is_main and any(root.local or root.exists(f"{one}/{MANIFEST}") for one in names_of_states(root))
    return from_first_rank(found)


def states(
    root: Storage, process: Process, warn: Callable[[str], None], *, rows_later: bool = False
) -> Iterator[Saved]:
    """Yield the states that verify, newest first, the same on all ranks; `warn` is told of those passed over.

    Raises CheckpointError, on all ranks: the folder cannot be listed.
    """
    problem, names = None, []
    if process.is_main:
        try:
            names = names_of_states(root)
        except OSError as error:
            problem = f"{root.name} cannot be read: {_reason(error)}"
    problem, names = from_first_rank((problem, names))
    if problem is not None:
        raise CheckpointError(problem)
    for name in names:
        try:
            saved = open_saved(root.below(name), process, rows_later=rows_later)
        except CheckpointError as error:
            warn(str(error))
            continue
        yield saved


def latest(root: Storage, process: Process, warn: Callable[[str], None]) -> Saved | None:
    """Return the first of `states`, None if there is none."""
    return next(states(root, process, warn), None)


def retain(root: Storage, keep: int, also: Collection[str] = ()) -> None:
    """Remove all but the newest `keep` states, those named, and what they build on. Rank 0 calls it after a save."""
    needed: set[str] = set()
    names = names_of_states(root)
    kept = 0
    for name in names:
        if kept >= keep and name not in also:
            continue
        try:
            manifest = read_manifest(root.below(name))
        except CheckpointError:
            continue  # a torn folder does not count as one of those kept
        needed |= {name, *(link["name"] for link in manifest["chain"])}
        kept += 1
    for name in set(names) - needed:
        discard(root, name)


def discard(root: Storage, name: str) -> None:
    """Remove a state so that a half removed one is never taken for one."""
    root.note(f"removing {name}")
    if root.local:
        root.remove(f"{DELETED}{name}")
        root.rename(name, f"{DELETED}{name}")
        root.remove(f"{DELETED}{name}")
    else:
        root.remove(f"{name}/{MANIFEST}")
        root.remove(name)


def clean(root: Storage) -> None:
    """Remove what earlier jobs left half written or half removed, and put back what a killed one was about to replace.
    Only for who holds the folder's lock."""
    for name in root.names():
        meant = name.removeprefix(REPLACED)
        if meant != name and not root.local:
            _put_back(root, meant)
        elif name.startswith((PARTIAL, DELETED)) or (meant != name and root.exists(meant)):
            root.remove(name)
        elif meant != name:
            root.rename(name, meant)
