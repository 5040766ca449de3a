"""Small tables and states of them, for the tests of saved states."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tessera.distributed.rank import Process
from tessera.distributed.saved.dense import load_tensors, save_tensors
from tessera.distributed.saved.states import open_saved, save
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableSaver, describe_tables, load_pending, load_rows, load_table_state
from tessera.embedding.config import Admission, DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.table import DynamicTable
from tessera.kernels.message import owner_of
from tessera.kernels.mix import mix64

GROUPS = (Group("v", 4, 0.5), Group("w", 1, 0.5))
INT8 = (Group("v", 4, 0.5, format="int8", scale=0.01), Group("w", 1, 0.5))


def alone() -> Process:
    """A process of a job of one rank. Its process group must be there: see the fixture in conftest.py."""
    return Process(0, 0, 1, torch.device("cpu"), dist.HashStore())


def config(optimizer: str = "adam", name: str = "a", groups=GROUPS, factor=1.0, **options) -> DynamicTableConfig:
    rows = RowOptimizer(optimizer, lr=0.1, old_rows_factor=factor)
    return DynamicTableConfig(name, (name,), groups, rows, seed=3, **options)


EXACT = Admission("exact", threshold=3)


def step(table: DynamicTable, number: int, rank: int = 0, ranks: int = 1) -> None:
    """One training step on ids that depend on its number alone; a rank sees those it owns."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(-(2**62), 2**62, (40,), generator=generator)
    ids = torch.cat([ids, torch.arange(number % 7, 60, 3)])
    grads = torch.randn(len(ids), 5, generator=generator)
    mine = owner_of(mix64(ids), ranks) == rank
    rows = table.lookup(ids[mine], 100 + number)
    table.update(rows, grads[mine, : table.config.width])
    table.expire(100 + number)


def content(tables: dict[str, DynamicTable], numbers: bool = False) -> dict[str, dict[int, tuple]]:
    """table -> id -> all that a row is."""
    found = {}
    for name, table in tables.items():
        batch = table.read_rows(table.rows_in_use())
        columns = [batch.values, batch.state, batch.last_seen, batch.count, *([batch.rows] if numbers else [])]
        columns += [column for column in (batch.scale, batch.period) if column is not None]
        found[name] = {
            i: tuple(column[place].numpy().tobytes() for column in columns)
            for place, i in enumerate(batch.ids.tolist())
        }
    return found


def save_tables(
    saver: TableSaver, root: Storage, name: str, process: Process, number: int, chain: list | None = None
) -> dict:
    """One state of tables alone. chain: [] or links for a delta; None for a full state."""
    parts = saver.take(delta=bool(chain))
    saver.follow(deltas=True)
    tensors = {f"rank/{process.rank}/{key}": value for key, value in parts.state.items()}

    def write(storage: Storage) -> dict:
        save_tensors(storage, tensors, process)
        parts.write(storage, process)
        return {}

    kind = "delta" if chain else "full"
    training = {"n": number, "tables": describe_tables(saver._tables)}
    return save(root, name, write, lambda *_: training, process, step=number, kind=kind, chain=chain or [])


def load_tables(tables: dict[str, DynamicTable], folder: str | Path | Storage, process: Process) -> list[str]:
    """Fill empty tables from a state, as `Checkpoints.resume` does. Returns what could not be taken over."""
    saved = open_saved(folder if isinstance(folder, Storage) else Storage(folder), process)
    load_rows(tables, saved, process, in_place=saved.ranks == process.world_size)
    load_pending(tables, saved, process)
    tensors = load_tensors(saved.folders[0], lambda name: name.startswith("rank/"))
    by_rank = [
        {
            name.removeprefix(f"rank/{rank}/"): value
            for name, value in tensors.items()
            if name.startswith(f"rank/{rank}/")
        }
        for rank in range(saved.ranks)
    ]
    return load_table_state(tables, saved, by_rank, process)
