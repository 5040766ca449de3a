"""Measure single kernels on one thread: medians, and ratios to what else does the same job in one run.

    python scripts/bench/kernels.py [--repeat 30] [--only unique rows]

Whole steps, the id map and growth are measured by `tables.py`. Other work on the machine shows in the absolute numbers
and less in the ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from tessera.kernels.backend import backend
from tessera.kernels.chunks import allocate_chunk
from tessera.kernels.gather import gather
from tessera.kernels.optimizers import OptimizerSettings, state_width
from tessera.kernels.unique import unique_inverse
from tessera.kernels.update import update
from tessera.scripts.bench.timing import alternate

FEATURES, BATCH, DIM = 26, 4096, 16
IDS = FEATURES * BATCH  # 106,496 ids per step
ROWS = FEATURES * 50_000
CHUNK_ROWS = 1 << 18
MILLION = 1_000_000


def show(what: str, *columns: str) -> None:
    print(f"{what:44s}" + "".join(f"{column:>22s}" for column in columns), flush=True)


def zipf_steps(steps: int) -> list[torch.Tensor]:
    """Return row numbers [IDS] for each step: 26 features of 50,000 values, P(value k) ~ 1 / k."""
    generator = torch.Generator().manual_seed(1)
    offsets = (torch.arange(FEATURES) * (ROWS // FEATURES)).repeat_interleave(BATCH)
    found = []
    for _ in range(steps):
        share = torch.rand(IDS, generator=generator, dtype=torch.float64)
        value = (ROWS // FEATURES) ** share
        found.append(value.long().clamp(max=ROWS // FEATURES) - 1 + offsets)
    return found


def empty_table(rows: int, width: int) -> list[torch.Tensor]:
    count = -(-rows // CHUNK_ROWS)
    return [allocate_chunk((CHUNK_ROWS, width)).fill_(0.5) for _ in range(count)]


def bench_unique(repeat: int) -> None:
    steps = zipf_steps(20)
    turn = {"ours": 0, "torch": 0}

    def of_turn(name: str) -> torch.Tensor:
        turn[name] += 1
        return steps[turn[name] % len(steps)]

    works = {
        "ours": lambda: unique_inverse(of_turn("ours")),
        "torch": lambda: torch.unique(of_turn("torch"), return_inverse=True, return_counts=True),
    }
    found = alternate(works, repeat)
    share = unique_inverse(steps[0])[0].numel() / IDS
    show(f"unique + inverse + counts, {share:.0%} distinct", "tessera", "torch.unique")
    show(f"  {IDS:,} ids", f"{found['ours'] * 1e3:.2f} ms", f"{found['torch'] * 1e3:.2f} ms")


def bench_rows(repeat: int) -> None:
    """Measure random rows, all distinct: bytes of the rows that are read or written, per second."""
    dense = torch.zeros(ROWS, DIM)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randperm(ROWS, generator=generator)[:IDS]
    out, grads = torch.empty(IDS, DIM), torch.randn(IDS, DIM)
    tables = {name: empty_table(ROWS, DIM + state_width(name, DIM)) for name in ("rowwise_adagrad", "adam")}
    works: dict[str, Callable[[], object]] = {
        "plain": lambda: torch.index_select(dense, 0, rows, out=out),
        "gather": lambda: gather(tables["rowwise_adagrad"], rows, DIM),
    }
    for name, chunks in tables.items():
        works[name] = partial(update, name, chunks, rows, grads, settings=OptimizerSettings(0.1))
    found = alternate(works, repeat)
    plain = IDS * DIM * 4 / found["plain"] / 1e9
    show(f"{IDS:,} random rows of {ROWS / MILLION:.1f} M, dim {DIM}", "time", "GB/s", "of plain gather")
    bytes_of = {"plain": DIM * 4, "gather": DIM * 4}
    for name, chunks in tables.items():
        bytes_of[name] = 2 * chunks[0].shape[1] * 4
    for name, time_ in found.items():
        rate = IDS * bytes_of[name] / time_ / 1e9
        label = {"plain": "index_select of one dense table", "gather": "gather"}.get(name, f"update {name}")
        show(f"  {label}", f"{time_ * 1e3:.2f} ms", f"{rate:.2f}", f"{rate / plain:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the table kernels on one thread.")
    parts = {"unique": bench_unique, "rows": bench_rows}
    parser.add_argument("--repeat", type=int, default=30, help="repetitions of every measurement")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="parts to run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"backend {backend()}, torch {torch.__version__}, 1 thread, {arguments.repeat} repetitions, medians")
    for part in arguments.only:
        parts[part](arguments.repeat)


if __name__ == "__main__":
    main()
