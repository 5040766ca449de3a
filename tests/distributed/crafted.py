"""States changed by hand so that checksums still match, as somebody would who means harm."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessera.distributed.saved.manifest import MANIFEST, checksum
from tessera.distributed.saved.storage import seal

WRONG = (None, {}, [], "", -1, 10**30, True, "../../x", 0.5)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Put a manifest in a folder with the checksum that it needs."""
    manifest = manifest | {"checksum": checksum(manifest)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def reseal(folder: Path, *more: str) -> None:
    """Let the manifest list its files as they are now, and these besides."""
    manifest = json.loads((folder / MANIFEST).read_text())
    paths = [path for path in {*manifest["files"], *more} if (folder / path).exists()]
    manifest["files"] = {path: vars(seal((folder / path).read_bytes())) for path in sorted(paths)}
    write_manifest(folder, manifest)


def mutations(node: Any, whole: Any = None, place: tuple = ()) -> Iterator[tuple[str, Any]]:
    """What was changed, and a copy of a JSON value in which one value somewhere is of another type or size."""
    whole = node if whole is None else whole
    for wrong in WRONG if place else ():
        changed = copy.deepcopy(whole)
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = wrong
        yield f"{'.'.join(map(str, place))} = {wrong!r}", changed
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from mutations(value, whole, (*place, key))


class Marks:
    """Unpickled, it makes a file: what a command in a pickle would do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.marker),)


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Marks(marker))
