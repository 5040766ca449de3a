"""Compare saved states with the disk itself, and measure what a save costs training.

    python scripts/bench/checkpoint.py [--rows 4000000] [--dim 16] [--optimizer adam] [--folder DIR]

One table of one rank. Save and load are compared with writing and reading the same number of bytes in one plain file,
with fsync, in the same run; the page cache is warm for all reads unless the kernel lets us drop it. A plain read uses
one small buffer again and again. A table needs memory: a second load right behind the first takes what that one gave
back. On a virtual machine whose host lends it free memory only when it is touched the difference is large. So the file
is also read into memory that is kept, in large pages as tables have them, and what touching such memory costs alone is
given beside it.

The stall is the time that training stands still for a save that is written behind: at its moment, and in steps to keep
rows as they were. What the thread takes from training besides, as cores are shared, is given as longer steps. It is
measured with the table alone, all rows alike (the worst case: short steps that change as many rows as they can), and
with a DeepFM step of 26 fields and ids of Zipf frequencies.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tessera.ctr.models.deepfm import DeepFM
from tessera.ctr.models.tower import Fields
from tessera.distributed.rank import Process
from tessera.distributed.saved.states import open_saved, save
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableParts, TableSaver, describe_tables, load_rows
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.snapshot import Snapshot
from tessera.embedding.table import DynamicTable
from tessera.kernels.chunks import allocate_chunk
from tessera.kernels.unique import unique_inverse
from tessera.scripts.bench.timing import seconds

BLOCK = 1 << 22
CHUNK = 1 << 26
BATCH, NUMERIC, FIELDS = 4096, 13, 26
LOADS = ("load", "again")  # the second right behind the first


def fill(table: DynamicTable, rows: int) -> None:
    for begin in range(0, rows, 1 << 18):
        table.lookup(torch.arange(begin, min(begin + (1 << 18), rows)), now=1)


def write_plain(path: Path, size: int) -> None:
    block = torch.randint(0, 256, (BLOCK,), dtype=torch.uint8).numpy().tobytes()
    with open(path, "wb") as file:
        for begin in range(0, size, BLOCK):
            file.write(block[: min(BLOCK, size - begin)])
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def read_and_keep(path: Path) -> None:
    """Read a file plainly into new memory, as large as the file."""
    left, chunks = path.stat().st_size, []
    with open(path, "rb", buffering=0) as file:
        while left:
            chunks.append(allocate_chunk((min(CHUNK, left),), torch.uint8))
            view = chunks[-1].numpy().data
            while view and (count := file.readinto(view[:BLOCK])):
                view, left = view[count:], left - count


def touch_new_memory(size: int) -> None:
    """Allocate a table's chunks and write one number of each page."""
    chunks = [allocate_chunk((CHUNK // 4096, 1024)) for _ in range(0, size, CHUNK)]
    for chunk in chunks:
        chunk[:, 0] = 1.0


def drop_cache() -> bool:
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        return False
    return True


def write_state(root: Storage, parts: TableParts, table: DynamicTable, process: Process) -> int:
    """Write a state; return its bytes."""

    def write(storage: Storage) -> dict:
        parts.write(storage, process)
        return {}

    manifest = save(root, "state", write, lambda *_: {"tables": describe_tables({"a": table})}, process)
    return sum(file["bytes"] for file in manifest["files"].values())


def load_state(root: Storage, config: DynamicTableConfig, process: Process) -> None:
    """Verify a state and read its rows into a new table, in place."""
    saved = open_saved(root.below("state"), process, rows_later=True)
    load_rows({config.name: DynamicTable(config)}, saved, process, in_place=True)


def step_of_table(table: DynamicTable, rows: int) -> Callable[[], None]:
    """Return a training step of the table with next to nothing on top of it."""
    generator = torch.Generator().manual_seed(1)
    tower = torch.nn.Sequential(torch.nn.Linear(table.config.width, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))

    def step() -> None:
        ids = torch.randint(0, rows, (BATCH,), generator=generator).unique()
        found = table.lookup(ids, now=2)
        embeddings = table.gather(found).requires_grad_()
        tower(embeddings).square().mean().backward()
        assert embeddings.grad is not None
        table.update(found, embeddings.grad)

    return step


def step_of_deepfm(table: DynamicTable, rows: int) -> Callable[[], None]:
    """Return a training step of DeepFM whose fields share the table's rows. Its weights w are the first column of v."""
    generator = torch.Generator().manual_seed(1)
    names = Fields(tuple(f"I{i}" for i in range(NUMERIC)), tuple(f"C{i}" for i in range(FIELDS)))
    dim, of_field = table.config.width, rows // FIELDS
    tower = DeepFM(names, dim, (400, 400, 400), dropout=0.0, batch_norm=False)
    optimizer = torch.optim.Adam(tower.parameters(), fused=True)
    numeric, labels = torch.rand(BATCH, NUMERIC), torch.randint(0, 2, (BATCH,)).float()

    def step() -> None:
        # Log-uniform ranks have Zipf frequencies; the product scatters them over the rows of their field.
        ranks = of_field ** torch.rand((BATCH, FIELDS), generator=generator, dtype=torch.float64)
        ids = ranks.long() * 2654435761 % of_field + of_field * torch.arange(FIELDS)
        distinct, inverse, counts = unique_inverse(ids.flatten())
        found = table.lookup(distinct, now=2, counts=counts)
        embeddings = table.gather(found, inverse).view(BATCH, FIELDS, dim).requires_grad_()
        optimizer.zero_grad()
        logits = tower(numeric, {"v": embeddings, "w": embeddings[..., :1]})
        F.binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()
        assert embeddings.grad is not None
        table.update(found, embeddings.grad.view(-1, dim), inverse)

    return step


def steps_while(step: Callable[[], None], running: Callable[[], bool]) -> list[float]:
    """Return the seconds of each step for as long as `running`."""
    times = []
    while running():
        times.append(seconds(step))
    return times


def stall(table: DynamicTable, step: Callable[[], None], root: Storage, process: Process) -> dict[str, float]:
    """Train while a save is written behind. Seconds: its moment, keeping rows, the save, what steps took longer."""
    end = time.perf_counter() + 3.0
    alone = statistics.median(steps_while(step, lambda: time.perf_counter() < end))
    keeping, keep = 0.0, Snapshot.save_old

    def timed_keep(snapshot: Snapshot, rows: torch.Tensor) -> None:
        nonlocal keeping
        keeping += seconds(partial(keep, snapshot, rows))

    with patch.object(Snapshot, "save_old", timed_keep):
        began = time.perf_counter()
        parts = TableSaver({table.config.name: table}).take(delta=False)
        moment = time.perf_counter() - began
        writer = threading.Thread(target=write_state, args=(root, parts, table, process))
        writer.start()
        during = steps_while(step, writer.is_alive)
        duration = time.perf_counter() - began
    slower = sum(during) - len(during) * alone
    return {"moment": moment, "keeping": keeping, "save": duration, "slower": slower, "step": alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure; default: a temporary folder")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    process = Process(0, 0, 1, torch.device("cpu"), dist.HashStore())
    config = DynamicTableConfig("a", ("a",), (Group("v", options.dim, 0.01),), RowOptimizer(options.optimizer))
    table = DynamicTable(config)
    fill(table, options.rows)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root, plain = Storage(f"{folder}/states"), Path(folder) / "plain"
        measure(table, options.rows, root, plain, process, options.repeats)
    dist.destroy_process_group()


def measure(table: DynamicTable, rows: int, root: Storage, plain: Path, process: Process, repeats: int) -> None:
    best: dict[str, float] = {}

    def note(name: str, seconds: float) -> None:
        best[name] = min(seconds, best.get(name, seconds))

    size, cold = 0, False
    note("new memory", seconds(partial(touch_new_memory, rows * table.config.bytes_per_row)))
    for _ in range(repeats):
        shutil.rmtree(root.full(), ignore_errors=True)
        began = time.perf_counter()
        size = write_state(root, TableSaver({"a": table}).take(delta=False), table, process)
        note("save", time.perf_counter() - began)
        note("plain write", seconds(partial(write_plain, plain, size)))
        for name in LOADS:
            cold = drop_cache()
            note(name, seconds(partial(load_state, root, table.config, process)))
        for name, read in (("plain read", read_plain), ("plain read, kept", read_and_keep)):
            cold = drop_cache() and cold
            note(name, seconds(partial(read, plain)))
        plain.unlink()
    rate = {name: size / seconds / 1e6 for name, seconds in best.items()}
    print(f"{rows:,} rows of {table.config.bytes_per_row} bytes in memory, {size / rows:.1f} bytes on disk; ", end="")
    print(f"best of {repeats}; page cache {'dropped before reads' if cold else 'warm'}")
    for name, *plain_names in (("save", "plain write"), *((n, "plain read", "plain read, kept") for n in LOADS)):
        told = [f"{plain:<16}{rate[plain]:>6,.0f} MB/s, ratio {rate[name] / rate[plain]:.2f}" for plain in plain_names]
        print(f"{name:<6}{rate[name]:>6,.0f} MB/s   {'   '.join(told)}")
    memory = rows * table.config.bytes_per_row / best["new memory"] / 1e6
    print(f"       to touch the memory of a table: {memory:,.0f} MB/s, {best['new memory']:.2f} s ", end="")
    print(f"(load {best['load']:.2f} s, again {best['again']:.2f} s, plain read {best['plain read']:.2f} s)")
    for name, step in (("table alone", step_of_table(table, rows)), ("DeepFM", step_of_deepfm(table, rows))):
        stall(table, step, root, process)
        behind = stall(table, step, root, process)  # now the memory for rows that are kept is there
        stopped = behind["moment"] + behind["keeping"]
        print(f"{name}: written behind in {behind['save']:.2f} s; training stands still for {stopped:.3f} s ", end="")
        print(f"({stopped / behind['save']:.1%} of the save; {behind['moment']:.3f} s at its moment); ", end="")
        print(f"steps of {1e3 * behind['step']:.1f} ms take {behind['slower']:.2f} s longer")


if __name__ == "__main__":
    main()
