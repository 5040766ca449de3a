"""Make one full state of a delta and those that it builds on. Reads and writes one file's rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tessera.distributed.rank import Process
from tessera.distributed.saved.manifest import TRAINING, CheckpointError, read_manifest
from tessera.distributed.saved.row_files import EVICTED, ROWS, Columns, copied, no_rows, read_columns, write_columns
from tessera.distributed.saved.states import Saved, names_of_states, save
from tessera.distributed.saved.storage import READ_BYTES, Storage


def newest_rows(folders: Sequence[Storage], path: str) -> Iterator[Columns]:
    """Yield rows of one rank's file of a table, each once: from the newest folder that has it, unless evicted since.

    folders: newest first. path: "rows/<table>/<rank>-of-<ranks>.parquet".
    """
    hidden = torch.empty(0, dtype=torch.int64)
    for folder in folders:
        seen = []
        for columns in read_columns(folder, path, 0, 1):
            chosen = (~torch.isin(columns["id"], hidden)).nonzero().flatten()
            seen.append(columns["id"])
            yield {name: column.index_select(0, chosen) for name, column in columns.items()}
        evicted = path.replace(f"{ROWS}/", f"{EVICTED}/", 1)
        if folder.exists(evicted):
            seen += [columns["id"] for columns in read_columns(folder, evicted, 0, 1)]
        hidden = torch.cat([hidden, *seen]).unique()


def compact(root: Storage, saved: Saved, process: Process) -> dict[str, Any]:
    """Replace the delta `saved`, the newest of `root`, by a full state of the same step. Returns its manifest.

    Raises:
        CheckpointError: a newer state builds on it, or it cannot be written.
    """
    name = saved.folders[0].base_name
    for other in names_of_states(root):
        try:
            chain = read_manifest(root.below(other))["chain"]
        except CheckpointError:
            continue
        if name in [link["name"] for link in chain]:
            raise CheckpointError(f"{other} builds on {name}; compact {other} instead")
    return save_merged(root, name, saved, process, "full")


def save_merged(
    root: Storage, name: str, saved: Saved, process: Process, kind: str, said: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write one folder with all rows of a delta and those that it builds on. Returns its manifest.

    said: what its description and its manifest hold besides.

    Raises CheckpointError: it cannot be written.
    """
    folder = saved.folders[0]

    def write(target: Storage) -> dict[str, Any]:
        for path in saved.manifest["files"]:
            if path.startswith(f"{EVICTED}/") or path == TRAINING:
                continue
            if not path.startswith("rows/"):
                _copy(folder, target, path)
                continue
            parts = list(newest_rows(saved.folders, path)) or [no_rows(folder, path)]
            ranks = int(path.removesuffix(".parquet").rpartition("-of-")[2])
            write_columns(target, path, copied({c: torch.cat([part[c] for part in parts]) for c in parts[0]}), ranks)
        return {}

    def describe(*_: object) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(folder.read(TRAINING))
        return described | (said or {})

    return save(root, name, write, describe, process, step=saved.step, kind=kind, world_size=saved.ranks, notes=said)


def _copy(source: Storage, target: Storage, path: str) -> None:
    with source.open(path) as file, target.write(path) as stream:
        while block := file.read(READ_BYTES):
            stream.write(block)
