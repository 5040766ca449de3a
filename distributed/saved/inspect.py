"""Print saved states as text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from tessera.distributed.plan import size
from tessera.distributed.rank import Process
from tessera.distributed.saved.compact import compact, newest_rows
from tessera.distributed.saved.dense import tensor_shapes
from tessera.distributed.saved.manifest import MANIFEST, TRAINING, CheckpointError, check, read_manifest
from tessera.distributed.saved.row_files import Columns, folder_name
from tessera.distributed.saved.states import Saved, latest, names_of_states, open_saved
from tessera.distributed.saved.storage import Storage
from tessera.embedding.errors import ConfigError

PROGRESS = {"progress": {"epoch": int, "best": (float, None)}, "reader": ({"lane_offsets": [int]}, None)}


def inspect(path: str, table: str | None, row_id: int | None, rows: int, *, compacting: bool) -> int:
    """Print the states at a path. Returns 1 if one is damaged, else 0.

    Raises:
        ConfigError: no states there, or no such table. CheckpointError: a single state that is damaged.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    process = Process(0, 0, 1, torch.device("cpu"), dist.HashStore())
    try:
        return _inspect(Storage(path), table, row_id, rows, compacting=compacting, process=process)
    finally:
        dist.destroy_process_group()


def _inspect(
    folder: Storage, table: str | None, row_id: int | None, rows: int, *, compacting: bool, process: Process
) -> int:
    if folder.exists(MANIFEST):
        saved = open_saved(folder, process)
        damaged: list[str] = []
        _mention_strays(saved)
    else:
        root = folder.below("checkpoints") if folder.exists("checkpoints") else folder
        if not names_of_states(root):
            raise ConfigError(f"{folder.name} holds no saved states")
        damaged = _list(root, process)
        newest = latest(root, process, lambda _: None)
        if newest is None:
            return 1
        if compacting:
            compact(root, newest, process)
            newest = latest(root, process, print)
            assert newest is not None, "it was saved just now"
            print(f"{newest.name} is a full state now")
        saved = newest
    if table is None:
        _show(saved)
    else:
        _show_rows(saved, table, row_id, rows)
    return 1 if damaged else 0


def _list(root: Storage, process: Process) -> list[str]:
    """Print one line per state, newest first; return the problems of damaged ones."""
    damaged = []
    for name in names_of_states(root):
        try:
            manifest = read_manifest(root.below(name))
            total = size(sum(file["bytes"] for file in manifest["files"].values()))
            opened = open_saved(root.below(name), process)
            builds = f", builds on {len(manifest['chain'])} earlier" if manifest["chain"] else ""
            print(
                f"{name}  {manifest['kind']}{builds}  {total}  {manifest['world_size']} rank(s)  {manifest['written']}"
            )
            _mention_strays(opened)
        except CheckpointError as error:
            print(f"{name}  DAMAGED: {error}")
            damaged.append(name)
    return damaged


def _mention_strays(saved: Saved) -> None:
    strays = saved.folders[0].strays()
    if strays:
        shown = ", ".join(strays[:3]) + (", …" if len(strays) > 3 else "")
        print(
            f"{saved.folders[0].base_name}  has {len(strays)} file(s) beside what its manifest lists, ignored: {shown}"
        )


def _show(saved: Saved) -> None:
    print(f"\n{saved.name}: step {saved.step}, {size(saved.bytes)} in {len(saved.manifest['files'])} files")
    progress = saved.training.get("progress", {})
    if progress:
        check(saved.training, PROGRESS, f"{saved.name}/{TRAINING}")
        reader = saved.training["reader"] or {"lane_offsets": []}  # between two days there is none
        print(f"epoch {progress['epoch']}, best {progress['best']}, reader at row {sum(reader['lane_offsets'])}")
    for table, kinds in saved.training.get("tables", {}).items():
        count, columns = 0, {}
        for columns in _rows(saved, table):
            count += columns["id"].numel()
        shapes = ", ".join(f"{name} {list(c.shape[1:]) or ''}{str(c.dtype)[6:]}" for name, c in columns.items())
        print(f"table {table}: {count:,} rows, {kinds['optimizer']}; {shapes}")
    for name, (shape, dtype) in sorted(tensor_shapes(saved.folders[0]).items()):
        if not name.startswith("rank/"):
            print(f"{name} {list(shape)} {str(dtype)[6:]}")


def _rows(saved: Saved, table: str) -> Iterator[Columns]:
    prefix = f"rows/{folder_name(table)}/"
    for path in saved.manifest["files"]:
        if path.startswith(prefix):
            yield from newest_rows(saved.folders, path)


def _show_rows(saved: Saved, table: str, row_id: int | None, rows: int) -> None:
    if table not in saved.training.get("tables", {}):
        raise ConfigError(
            f"{saved.name} has no table {table!r}; expected {', '.join(saved.training.get('tables', {}))}"
        )
    left = rows
    for columns in _rows(saved, table):
        places = torch.arange(columns["id"].numel())
        if row_id is not None:
            signed = row_id - 2**64 if row_id >= 2**63 else row_id  # ids are kept as 64 bits
            places = (columns["id"] == signed).nonzero().flatten()
        for place in places[:left].tolist():
            print("  ".join(f"{name} {column[place].tolist()}" for name, column in columns.items()))
            left -= 1
        if left <= 0:
            return
    if row_id is not None and left == rows:
        print(f"id {row_id} has no row")
