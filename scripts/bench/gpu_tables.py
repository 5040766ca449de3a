"""Measure tables in GPU memory: look-up and update of one step, beside a device copy, and the id map.

    python scripts/bench/gpu_tables.py [--rows 1000000] [--repeat 50] [--only steps map] [--device cpu]

Needs torch and Triton alone: it imports `kernels/` and `embedding/`. A step is what training does with 1.05 M ids of 10
tables (104,857 each, P(value k) ~ k^-1.05, dim 128): merge duplicates, find rows and touch them (dynamic tables only),
gather a row for every occurrence, update by as many gradients. Tables hold all ids before. The static table is given
row numbers and does the rest alike, on the same bytes. `distinct` repeats both with ids that are all different.

Times are medians of CUDA events over steps with different batches. GB/s counts what a step has to move once: values of
distinct rows read, outputs written, gradients read, distinct rows (with state) read and written; the copy's counts what
it reads and writes. --device cpu runs the same on the CPU, small, to check this script: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.row_store import RowStore
from tessera.embedding.table import DynamicTable
from tessera.kernels import backend
from tessera.kernels.id_map import IdMap
from tessera.kernels.unique import unique_inverse

OPTIMIZERS = ("sgd", "rowwise_adagrad", "adam")
FORMATS = ("fp32", "fp16", "int8")
EXPONENT = 1.05
BATCHES = 8  # different ones, in turn
GIB = 1 << 30


@dataclass(frozen=True)
class Sizes:
    tables: int
    ids: int  # of one table in one step
    dim: int
    rows: int  # of one table
    lookups: int  # in one call of the id map
    copy: int  # bytes


def timed(work: Callable[[int], object], repeat: int, device: torch.device) -> float:
    """Return the median seconds of work(0), work(1), ..."""
    times = []
    for turn in range(repeat + 3):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work(turn)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            work(turn)
            times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def spread(rows: Tensor) -> Tensor:
    """Return ids of row numbers: different 64-bit numbers in no order."""
    return rows * -7046029254386353131


def drawn_rows(sizes: Sizes, *, distinct: bool, seed: int) -> Tensor:
    """Return the row numbers int64 [ids] of one step and table."""
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        return torch.randperm(sizes.rows, generator=generator)[: sizes.ids]
    share = torch.rand(sizes.ids, generator=generator, dtype=torch.float64)
    power = 1 - EXPONENT
    values = ((sizes.rows**power - 1) * share + 1) ** (1 / power)
    return values.long().clamp(1, sizes.rows) - 1


def config_of(number: int, dim: int, format: str, optimizer: str) -> DynamicTableConfig:
    group = Group("v", dim, 0.01, format, scale=0.001)
    return DynamicTableConfig(f"t{number}", (f"f{number}",), (group,), RowOptimizer(optimizer, lr=0.01))


class Dynamic:
    """One dynamic table that holds all ids."""

    def __init__(self, config: DynamicTableConfig, sizes: Sizes, device: torch.device) -> None:
        self.table = DynamicTable(config, device)
        for rows in torch.arange(sizes.rows, device=device).split(1 << 17):
            self.table.lookup(spread(rows), 0)

    def step(self, rows: Tensor, grads: Tensor) -> None:
        unique, inverse, counts = unique_inverse(rows)
        found = self.table.lookup(unique, 1, counts)
        self.table.gather(found, inverse)
        self.table.update(found, grads, inverse, ids=unique)


class Static:
    """The same rows, known by number."""

    def __init__(self, config: DynamicTableConfig, sizes: Sizes, device: torch.device) -> None:
        self.store = RowStore(config, device)
        self.store.reserve(sizes.rows)
        for rows in torch.arange(sizes.rows, device=device).split(1 << 17):
            self.store.initialise(rows, spread(rows))

    def step(self, rows: Tensor, grads: Tensor) -> None:
        unique, inverse, _ = unique_inverse(rows)
        self.store.gather(unique, inverse)
        self.store.update(unique, grads, inverse, None, unique, 1)


def moved_bytes(config: DynamicTableConfig, batches: list[list[Tensor]]) -> float:
    """Return the bytes that a step has to move once, mean of the batches."""
    width = config.width * 4
    values = config.stored_bytes - 4 * config.state_width
    total = 0
    for batch in batches:
        for rows in batch:
            distinct = rows.unique().numel()
            total += 2 * width * rows.numel() + distinct * (values + 2 * config.stored_bytes)
    return total / len(batches)


def bench_steps(sizes: Sizes, repeat: int, device: torch.device, copy_speed: float) -> None:
    """Measure and print the table of steps."""
    print(f"{'ids':<10}{'format':<8}{'optimizer':<18}{'distinct':>10}", end="")
    print(f"{'static ms':>11}{'dynamic ms':>12}{'ratio':>7}{'static GB/s':>13}{'dynamic GB/s':>14}{'of copy':>9}")
    grads = [torch.randn(sizes.ids, sizes.dim, device=device) for _ in range(sizes.tables)]
    for distinct in (False, True):
        drawn = [
            [drawn_rows(sizes, distinct=distinct, seed=100 * b + t) for t in range(sizes.tables)]
            for b in range(BATCHES)
        ]
        numbers = [[rows.to(device) for rows in batch] for batch in drawn]
        ids = [[spread(rows) for rows in batch] for batch in numbers]
        share = sum(rows.unique().numel() for rows in drawn[0])
        for format in FORMATS:
            for optimizer in OPTIMIZERS:
                configs = [config_of(number, sizes.dim, format, optimizer) for number in range(sizes.tables)]
                seconds = []
                for kind, batches in ((Static, numbers), (Dynamic, ids)):
                    tables = [kind(config, sizes, device) for config in configs]
                    seconds.append(timed(scales_of(tables, batches, grads), repeat, device))
                    del tables
                    backend.check(device)
                moved = moved_bytes(configs[0], drawn)
                static, dynamic = (moved / one / 1e9 for one in seconds)
                print(
                    f"{'distinct' if distinct else 'power law':<10}{format:<8}{optimizer:<18}{share:>10,}"
                    f"{seconds[0] * 1e3:>11.3f}{seconds[1] * 1e3:>12.3f}{seconds[1] / seconds[0]:>7.2f}"
                    f"{static:>13.0f}{dynamic:>14.0f}{dynamic / copy_speed:>9.0%}",
                    flush=True,
                )


def scales_of(tables: list, batches: list[list[Tensor]], grads: list[Tensor]) -> Callable[[int], None]:
    def work(turn: int) -> None:
        for table, rows, grad in zip(tables, batches[turn % BATCHES], grads, strict=True):
            table.step(rows, grad)

    return work


def copy_bandwidth(sizes: Sizes, repeat: int, device: torch.device) -> float:
    """Return the GB/s read and written by a copy on the device."""
    source = torch.ones(sizes.copy, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copy / timed(lambda turn: target.copy_(source), repeat, device) / 1e9


def bench_map(sizes: Sizes, repeat: int, device: torch.device) -> None:
    """Measure ids found per second, known and unknown, and ids inserted per second."""
    id_map, known = IdMap(device), spread(torch.arange(10 * sizes.rows, device=device))
    start = time.perf_counter()
    for begin in range(0, known.numel(), sizes.ids):
        part = known[begin : begin + sizes.ids]
        id_map.insert(part, torch.arange(begin, begin + part.numel(), device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    inserted = known.numel() / (time.perf_counter() - start)
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randint(0, known.numel(), (sizes.lookups,), generator=generator).to(device) for _ in range(4)]
    asked = [known[pick] for pick in picks]
    found = timed(lambda turn: id_map.find(asked[turn % 4]), repeat, device)
    missed = timed(lambda turn: id_map.find(asked[turn % 4] + 1), repeat, device)
    print(f"id map of {known.numel():,} ids: {sizes.lookups / found / 1e9:.3f} G known ids found per second, ", end="")
    print(f"{sizes.lookups / missed / 1e9:.3f} G unknown ids, {inserted / 1e6:.1f} M ids inserted per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of each of the 10 tables")
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=("steps", "map"), default=("steps", "map"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_tables: no GPU at hand (torch.cuda.is_available() is False), nothing measured")
    if arguments.device == "cuda" and backend.triton_problem is not None:
        sys.exit(f"gpu_tables: no Triton kernels ({backend.triton_problem}), nothing measured")
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    sizes = Sizes(10, 104_857, 128, arguments.rows, 1 << 24, 4 * GIB)
    if arguments.device == "cpu":
        sizes = Sizes(2, 500, 16, 2_000, 1 << 12, 1 << 20)
        print("CPU: this checks the script, the figures mean nothing")
    else:
        import triton

        name = torch.cuda.get_device_name(device)
        print(f"{name} · torch {torch.__version__} · triton {triton.__version__} · python {platform.python_version()}")
    speed = copy_bandwidth(sizes, arguments.repeat, device)
    print(f"device copy of {sizes.copy / GIB:.3g} GiB: {speed:.0f} GB/s · medians of {arguments.repeat}")
    if "map" in arguments.only:
        bench_map(sizes, arguments.repeat, device)
    if "steps" in arguments.only:
        bench_steps(sizes, arguments.repeat, device, speed)


if __name__ == "__main__":
    main()
