"""Saved states against the disk itself, and what a save costs training.

    python scripts/bench/checkpoint.py [--rows 4000000] [--dim 16] [--optimizer adam] [--folder DIR]

One table of one rank. Save and load are compared with writing and reading the same number of bytes in one plain file,
with fsync, in the same run; the page cache is warm for both reads unless the kernel lets us drop it. A plain read uses
one small buffer again and again; reading into memory as new as that of the loaded table is given beside it.

The stall is the time that training stands still for a save that is written behind: at its moment, and in steps to keep
rows as they were. What the thread takes from training besides, as cores are shared, is given as longer steps.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from distributed.checkpoint import open_saved, save  # noqa: E402
from distributed.checkpoint_files import Storage  # noqa: E402
from distributed.checkpoint_tables import TableParts, TableSaver, describe_tables, load_rows  # noqa: E402
from distributed.process import Process  # noqa: E402
from embedding.config import DynamicTableConfig, Group, RowOptimizer  # noqa: E402
from embedding.snapshot import Snapshot  # noqa: E402
from embedding.table import DynamicTable  # noqa: E402
from scripts.bench.timing import seconds  # noqa: E402

BLOCK = 1 << 22
BATCH = 4096


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


def read_into_new_memory(path: Path, size: int) -> None:
    memory = memoryview(mmap.mmap(-1, size))
    with open(path, "rb", buffering=0) as file:
        for begin in range(0, size, BLOCK):
            file.readinto(memory[begin : begin + BLOCK])


def drop_cache() -> bool:
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        return False
    return True


def write_state(root: Storage, parts: TableParts, table: DynamicTable, process: Process) -> int:
    """Returns the bytes of the state."""

    def write(storage: Storage) -> dict:
        parts.write(storage, process)
        return {}

    manifest = save(root, "state", write, lambda *_: {"tables": describe_tables({"a": table})}, process)
    return sum(file["bytes"] for file in manifest["files"].values())


def load_state(root: Storage, config: DynamicTableConfig, process: Process, in_place: bool) -> tuple[float, float]:
    """Seconds to verify the files, and to read the rows into a new table."""
    began = time.perf_counter()
    saved = open_saved(root.below("state"), process)
    verified = time.perf_counter()
    load_rows({config.name: DynamicTable(config)}, saved, process, in_place=in_place)
    return verified - began, time.perf_counter() - verified


def steps_while(table: DynamicTable, rows: int, running: Callable[[], bool]) -> list[float]:
    """Seconds of each training step of this table for as long as `running`."""
    generator = torch.Generator().manual_seed(1)
    tower = torch.nn.Sequential(torch.nn.Linear(table.config.width, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    seconds = []
    while running():
        began = time.perf_counter()
        ids = torch.randint(0, rows, (BATCH,), generator=generator).unique()
        found = table.lookup(ids, now=2)
        embeddings = table.gather(found).requires_grad_()
        tower(embeddings).square().mean().backward()
        table.update(found, embeddings.grad)
        seconds.append(time.perf_counter() - began)
    return seconds


def stall(table: DynamicTable, rows: int, root: Storage, process: Process) -> dict[str, float]:
    """Train while a save is written behind. Seconds: its moment, keeping rows, the save, what steps took longer."""
    end = time.perf_counter() + 3.0
    alone = statistics.median(steps_while(table, rows, lambda: time.perf_counter() < end))
    keeping, keep = 0.0, Snapshot.keep

    def timed_keep(snapshot: Snapshot, rows: torch.Tensor) -> None:
        nonlocal keeping
        keeping += seconds(partial(keep, snapshot, rows))

    Snapshot.keep = timed_keep
    began = time.perf_counter()
    parts = TableSaver({table.config.name: table}).take(delta=False)
    moment = time.perf_counter() - began
    writer = threading.Thread(target=write_state, args=(root, parts, table, process))
    writer.start()
    during = steps_while(table, rows, writer.is_alive)
    duration = time.perf_counter() - began
    Snapshot.keep = keep
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
    for _ in range(repeats):
        shutil.rmtree(root.full(), ignore_errors=True)
        began = time.perf_counter()
        size = write_state(root, TableSaver({"a": table}).take(delta=False), table, process)
        note("save", time.perf_counter() - began)
        note("plain write", seconds(partial(write_plain, plain, size)))
        cold = drop_cache()
        verify, read = load_state(root, table.config, process, in_place=True)
        note("verify", verify)
        note("rows", read)
        note("load", verify + read)
        cold = drop_cache() and cold
        note("plain read", seconds(partial(read_plain, plain)))
        note("new memory", seconds(partial(read_into_new_memory, plain, size)))
        plain.unlink()
    rate = {name: size / seconds / 1e6 for name, seconds in best.items()}
    print(f"{rows:,} rows of {table.config.bytes_per_row} bytes in memory, {size / rows:.1f} bytes on disk; ", end="")
    print(f"best of {repeats}; page cache {'dropped before reads' if cold else 'warm'}")
    for name, plain_name in (("save", "plain write"), ("load", "plain read")):
        print(f"{name:<6}{rate[name]:>8,.0f} MB/s   {plain_name} {rate[plain_name]:>8,.0f} MB/s   ", end="")
        print(f"ratio {rate[name] / rate[plain_name]:.2f}")
    print(f"       of the load: checksums {rate['verify']:,.0f} MB/s, rows into the table {rate['rows']:,.0f} MB/s")
    print(f"       plain read from the page cache into new memory {rate['new memory']:,.0f} MB/s")
    stall(table, rows, root, process)
    behind = stall(table, rows, root, process)  # now the memory for rows that are kept is there
    stopped = behind["moment"] + behind["keeping"]
    print(f"written behind in {behind['save']:.2f} s: training stands still for {stopped:.3f} s ", end="")
    print(f"({stopped / behind['save']:.1%} of the save; {behind['moment']:.3f} s at its moment); ", end="")
    print(f"steps of {1e3 * behind['step']:.1f} ms take {behind['slower']:.2f} s longer")


if __name__ == "__main__":
    main()
