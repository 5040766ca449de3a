"""Read and check the manifest of a saved state, which lists all that belongs to the state.

A state may come from somebody else. So file names must lead to files inside its folder, and every value out of a JSON
file is compared with what this version writes before it is used.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

from tessera.distributed.saved.storage import Sealed, Storage
from tessera.embedding.errors import TesseraError

FORMAT = 2
MANIFEST = "manifest.json"
TRAINING = "training.json"
KINDS = ("full", "delta", "model")
PICKLED = (
    "it has format 1, of Tessera 0.1 before states were safetensors: a part of it is pickled, and to open it could run "
    "code, so it is not opened; end that run with the version that wrote it, or train anew with this one"
)
FILE = {"bytes": int, "crc32": int}
MANIFEST_PATTERN = {
    "step": int,
    "kind": str,
    "world_size": int,
    "written": str,
    "chain": [{"name": str, "checksum": str}],
    "files": {str: FILE},
}
TABLES_PATTERN = {str: {"columns": {str: [(str, int)]}, "groups": [[(str, int)]], "optimizer": str}}
LARGEST = 2**63 - 1


class CheckpointError(TesseraError):
    """Raised when a state cannot be written, or the one asked for cannot be read."""


class SavedFolder(Storage):
    """The folder of a state as its manifest lists it: whatever else lies there is not seen, and no link is followed.

    Attributes:
        files: what the manifest lists, path -> size and checksum.
    """

    def __init__(self, folder: Storage, files: Mapping[str, Sealed]) -> None:
        vars(self).update(vars(folder))  # of the same client
        self._folder, self.files = folder, dict(files)

    def _at(self, name: str, root: str) -> Storage:
        return self._folder._at(name, root)

    def open(self, path: str, *, buffered: bool = True) -> BinaryIO:
        """Open a listed file. Raises FileNotFoundError where it is not listed, OSError where it is a link."""
        if path not in self.files and path != MANIFEST:
            raise FileNotFoundError(errno.ENOENT, "not listed in the manifest", path)
        if self.local and os.path.realpath(self.full(path)) != os.path.join(os.path.realpath(self.full()), path):
            raise OSError(errno.ELOOP, "it is a symbolic link, which states never hold", path)
        return super().open(path, buffered=buffered)

    def names(self, path: str = "") -> list[str]:
        """Return the names that the manifest lists directly in a folder, sorted."""
        prefix = f"{path}/" if path else ""
        return sorted({file[len(prefix) :].partition("/")[0] for file in self.files if file.startswith(prefix)})

    def exists(self, path: str) -> bool:
        return path in self.files or any(file.startswith(f"{path}/") for file in self.files)

    def strays(self) -> list[str]:
        """Return the paths of all files in the folder that the manifest does not list; nobody reads them."""
        return sorted(set(self.all_files()) - set(self.files) - {MANIFEST})


def checksum(manifest: Mapping[str, Any]) -> str:
    """Return the CRC-32, as hexadecimal text, of all that a manifest says but its own checksum."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "checksum"}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def read_manifest(folder: Storage) -> dict[str, Any]:
    """Return the manifest of a folder, with all keys and types that this version writes.

    Raises CheckpointError, one line: why the folder is no state that can be read.
    """
    try:
        manifest: Any = json.loads(folder.read(MANIFEST))
    except FileNotFoundError:
        raise CheckpointError("it has no manifest: a save that did not end, or not a state") from None
    except OSError as error:
        raise CheckpointError(f"its manifest cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its manifest cannot be read: {error}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found == 1 and found is not True:
        raise CheckpointError(PICKLED)
    if found != FORMAT:
        raise CheckpointError(f"it has format {shown(found)}; this version reads {FORMAT}")
    if manifest.get("checksum") != checksum(manifest):
        raise CheckpointError("its manifest was changed: its checksum does not match")
    check(manifest, MANIFEST_PATTERN, "its manifest")
    _check_names(manifest)
    return dict(manifest)


def _check_names(manifest: Mapping[str, Any]) -> None:
    for path in manifest["files"]:
        if not is_inside(path) or path == MANIFEST:
            raise CheckpointError(f"its manifest lists {shown(path)}; expected names of files inside the folder")
    for link in manifest["chain"]:
        if not is_inside(link["name"]) or "/" in link["name"]:
            raise CheckpointError(f"its manifest builds on {shown(link['name'])}; expected a folder beside it")
    if manifest["kind"] not in KINDS or manifest["world_size"] < 1:
        found = f"kind {shown(manifest['kind'])} and world_size {manifest['world_size']}"
        raise CheckpointError(f"its manifest has {found}; expected {', '.join(KINDS)} and at least 1")


def is_inside(path: str) -> bool:
    """Return whether a path leads to something inside the folder that it is relative to, on any file system."""
    return all(part not in ("", ".", "..") for part in path.split("/")) and not set(path) & set("\\:\0")


def files_listed(manifest: Mapping[str, Any]) -> dict[str, Sealed]:
    """Return size and checksum of each file of a manifest that `read_manifest` gave."""
    return {path: Sealed(one["bytes"], one["crc32"]) for path, one in manifest["files"].items()}


def read_training(folder: Storage) -> dict[str, Any]:
    """Return what describes a state: a JSON object, whose `tables`, if it has any, are as this version writes them.

    Raises CheckpointError, one line.
    """
    try:
        training = json.loads(folder.read(TRAINING))
    except OSError as error:
        raise CheckpointError(f"{TRAINING} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{TRAINING} cannot be read: {error}") from None
    check(training, {}, TRAINING)
    if "tables" in training:
        check(training["tables"], TABLES_PATTERN, f"{TRAINING}: tables")
    return dict(training)


def check(value: Any, pattern: Any, where: str) -> None:
    """Compare a value out of a JSON file with a pattern.

    Args:
        pattern: int (whole, from 0 on), float (any finite number), str, bool or None; a tuple of patterns of which one
            fits; [pattern] of each element; {name: pattern} of keys that must be there; {str: pattern} of each value.
        where: what the value is, for the message.

    Raises CheckpointError, one line: which value is not as expected.
    """
    if isinstance(pattern, tuple):
        if not any(_fits(value, one) for one in pattern):
            raise CheckpointError(f"{where} is {shown(value)}; expected {_named(pattern)}")
    elif isinstance(pattern, dict) and isinstance(value, dict):
        for key, one in value.items() if str in pattern else ():
            check(one, pattern[str], f"{where}.{key}")
        for key in pattern.keys() - {str}:
            if key not in value:
                raise CheckpointError(f"{where} has no {key!r}")
            check(value[key], pattern[key], f"{where}.{key}")
    elif isinstance(pattern, list) and isinstance(value, list):
        for place, one in enumerate(value):
            check(one, pattern[0], f"{where}[{place}]")
    elif isinstance(pattern, dict | list) or not _fits(value, pattern):
        raise CheckpointError(f"{where} is {shown(value)}; expected {_named(pattern)}")


def _fits(value: Any, pattern: Any) -> bool:
    if isinstance(pattern, dict | list):
        try:
            check(value, pattern, "")
        except CheckpointError:
            return False
        return True
    if pattern is None:
        return value is None
    if pattern is int:
        return type(value) is int and 0 <= value <= LARGEST
    if pattern is float:
        return type(value) in (int, float) and abs(value) <= LARGEST  # false for what is not a number, too
    return type(value) is pattern


def _named(pattern: Any) -> str:
    if isinstance(pattern, tuple):
        return " or ".join(_named(one) for one in pattern)
    if isinstance(pattern, dict | list):
        return "an object" if isinstance(pattern, dict) else "a list"
    names = {int: "a whole number from 0 on", float: "a number", str: "text", bool: "true or false", None: "null"}
    return names[pattern]


def shown(value: Any) -> str:
    """Return a short form of a value for a message of one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
