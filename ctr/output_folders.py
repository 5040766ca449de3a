"""Check and replace the folders that commands write: one rule for every target.

A target is missing, empty, or what the same command wrote there before; and it is never what the command reads, nor
lies inside that or around it. Otherwise the command ends with one line and nothing is touched. A command knows its
earlier result by the record that it left there, which lists every file: a file that somebody added is not the
command's to remove.

A new result is written into a folder beside the target and takes its place when it is complete.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tessera.distributed.atomic import exchange, sync_folder
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.distributed.folder_lock import FolderInUse, FolderLock
from tessera.distributed.rank import Process
from tessera.distributed.saved.storage import Storage
from tessera.embedding.errors import ConfigError

WILD = re.compile(r"[*?[]")
RECORD = ".written.json"  # hidden, so that no reader of data takes it for data
Own = Callable[[Path], str | None]  # why a folder that is not empty is not the command's own; None: it is


def check_place(target: Path, key: str, sources: Sequence[str | Path], places: Sequence[Path] = ()) -> None:
    """Raise ConfigError for a target that is one of the sources, or lies inside or around one. Links are followed.

    Args:
        key: what the user calls the target, for the message.
        sources: local paths; URIs are passed over, for targets are local.
        places: folders inside a source that are meant for targets.

    Raises ConfigError.
    """
    if any(_is_below(target, place) for place in places):
        return
    for source in sources:
        source = str(source).removeprefix("file://")
        if "://" not in source and not os.path.exists(source) and _matches(source, target):
            raise ConfigError(
                f"{key} {target} is matched by {source}, which is read; expected another place, nothing was written"
            )
        if "://" in source or not os.path.exists(source):
            continue
        if _is_below(target, source):
            how = "is" if _is_below(source, target) else "lies inside"
        elif _is_below(source, target):
            how = "contains"
        else:
            continue
        raise ConfigError(f"{key} {target} {how} {source}, which is read; expected another place, nothing was written")


def _matches(pattern: str, target: Path) -> bool:
    """Return whether a pattern matches a place, or a folder that it lies in."""
    parts = Path(os.path.realpath(os.path.expanduser(target))).parts
    levels = Path(os.path.abspath(os.path.expanduser(pattern))).parts
    plain = next((place for place, level in enumerate(levels) if WILD.search(level)), None)
    if plain is None:
        return False
    base = Path(os.path.realpath(Path(*levels[:plain]))).parts
    levels, below = levels[plain:], parts[len(base) :]
    least = levels.index("**") if "**" in levels else len(levels)
    if parts[: len(base)] != base or len(below) < least:
        return False
    for part, level in zip(below, levels, strict=False):
        if level == "**":
            return True
        if not fnmatch.fnmatchcase(part, level):
            return False
    return True


def _is_below(path: str | Path, folder: str | Path) -> bool:
    """Return whether a path is a folder or lies below it, under any of its names: also if folders are mounted twice."""
    above = Path(os.path.realpath(os.path.expanduser(path)))
    if not os.path.exists(folder):
        return Path(os.path.realpath(os.path.expanduser(folder))) in [above, *above.parents]
    return any(os.path.exists(one) and os.path.samefile(one, folder) for one in [above, *above.parents])


def check_target(target: Path, key: str, own: Own) -> None:
    """Raise ConfigError for a target that is neither missing, nor empty, nor the command's own.

    Raises ConfigError: one line that names an entry which is not the command's.
    """
    try:
        if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
            return
        problem = own(target) if target.is_dir() else "it is not a folder"
    except OSError as error:
        problem = f"it cannot be read: {error.strerror}"
    if problem:
        raise ConfigError(
            f"{key} {target} is not replaced: {problem}; expected a new folder, an empty one or an earlier result"
        )


def written_by(command: str) -> Own:
    """Return a check for targets: a folder passes if it is an earlier result of a command that leaves a record."""

    def own(folder: Path) -> str | None:
        files = _files_recorded(folder, command)
        if files is None:
            return f"it holds {min(os.listdir(folder))} and no record that {command} wrote it"
        return foreign_file(folder, {RECORD, *files}, command)

    return own


def _files_recorded(folder: Path, command: str) -> list[str] | None:
    """Return the files that a command's record lists; None if there is no such record."""
    try:
        record = json.loads((folder / RECORD).read_text())
        files = record["files"] if record["command"] == command else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files if isinstance(files, list) and all(isinstance(one, str) for one in files) else None


def claim(target: Path, key: str, command: str, sources: Sequence[str | Path]) -> None:
    """Make a folder for a command that adds to its earlier result and removes nothing.

    Raises ConfigError: the target is not the command's, or cannot be made.
    """

    def own(folder: Path) -> str | None:
        if _files_recorded(folder, command) is None:
            return f"it holds {min(os.listdir(folder))} and no record that {command} made it"
        return None

    check_place(target, key, sources)
    check_target(target, key, own)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not (target / RECORD).exists():
            (target / RECORD).write_text(json.dumps({"command": command, "files": []}))
    except OSError as error:
        raise ConfigError(f"{key} {target} cannot be made: {error.strerror}") from None


def foreign_file(folder: Path, own: set[str], command: str) -> str | None:
    """Return a message that names a file of a folder that is not among its own; None if there is none."""
    other = next((path for path in Storage(folder).all_files() if path not in own), None)
    return other and f"it holds {other}, which {command} did not write"


class Replacement:
    """A result that is being written, in `folder`, and takes the place of its target at the end.

    Raises ConfigError: the target is not the command's to replace, or a folder beside it cannot be made.
    """

    def __init__(
        self,
        target: Path,
        key: str,
        command: str,
        sources: Sequence[str | Path],
        places: Sequence[Path] = (),
        own: Own | None = None,
    ) -> None:
        self.target, self._key, self._command = Path(os.path.abspath(target.expanduser())), key, command
        self._own = own or written_by(command)
        check_place(target, key, sources, places)
        check_target(self.target, key, self._own)
        self.target = Path(os.path.realpath(self.target))  # what a link leads to is replaced, not the link
        beside, prefix = self.target.parent, f".{self.target.name}.writing-"
        try:
            beside.mkdir(parents=True, exist_ok=True)
            for left in [one for one in beside.iterdir() if one.name.startswith(prefix)]:
                _remove_if_dead(left)
            self._holder = Path(tempfile.mkdtemp(prefix=prefix, dir=beside))
            self._lock = FolderLock(self._holder)
            self.folder = self._holder / self.target.name  # of the same name, which pages show
            self.folder.mkdir()
        except OSError as error:
            raise ConfigError(f"{key} {target} cannot be made: {error.strerror}") from None

    def finish(self) -> None:
        """Put the result in its place. Raises ConfigError: something else came to lie there meanwhile."""
        try:
            folder = Storage(self.folder)
            files = folder.all_files()
            with folder.write(RECORD) as stream:
                stream.write(json.dumps({"command": self._command, "files": files}).encode())
            folder.sync_folders()
            check_target(self.target, self._key, self._own)
            self._place()
        except OSError as error:
            raise ConfigError(f"{self._key} {self.target} cannot be written: {error.strerror}") from None
        self.remove()

    def _place(self) -> None:
        if not self.target.is_dir() or not any(self.target.iterdir()):
            os.rename(self.folder, self.target)
        elif not exchange(self.folder, self.target):
            os.rename(self.target, self._holder / "replaced")
            os.rename(self.folder, self.target)
        sync_folder(self.target.parent)

    def remove(self) -> None:
        """Remove everything except what is in place already."""
        self._lock.release()
        shutil.rmtree(self._holder, ignore_errors=True)


@contextmanager
def replacing(
    target: Path,
    key: str,
    command: str,
    sources: Sequence[str | Path],
    places: Sequence[Path] = (),
    own: Own | None = None,
) -> Iterator[Path]:
    """Yield a folder beside the target that replaces it if the block succeeds, and is removed if it fails."""
    replacement = Replacement(target, key, command, sources, places, own)
    try:
        yield replacement.folder
        replacement.finish()
    except BaseException:
        replacement.remove()
        raise


@contextmanager
def replacing_on_ranks(
    process: Process,
    target: Path,
    key: str,
    command: str,
    sources: Sequence[str | Path],
    places: Sequence[Path] = (),
) -> Iterator[Path]:
    """Do the same as `replacing` when all ranks write into the folder: rank 0 makes it and puts it in place."""
    held: list[Replacement] = []

    def begin() -> Path:
        held.append(Replacement(target, key, command, sources, places))
        return held[0].folder

    process.folder = str(target)
    try:
        yield on_first_rank(process, begin)
        wait_for_all()
        on_first_rank(process, lambda: held[0].finish())
    except BaseException:
        for one in held:
            one.remove()
        raise


def _remove_if_dead(left: Path) -> None:
    """Remove what a killed command left half written; one that still runs holds its lock."""
    if (left / ".lock").exists():
        with suppress(FolderInUse):
            lock = FolderLock(left)
            shutil.rmtree(left, ignore_errors=True)
            lock.release()
