"""Measure the table part of a training step on one thread: all tables as one set beside one table after the other.

    OMP_NUM_THREADS=1 python scripts/bench/table_set.py [--rows 1.3] [--rounds 20] [--tables 26 200]

A step merges duplicates, looks up and touches, adds rows for new ids (a hundredth), gathers values for every
occurrence and updates, with groups v 16 and w 1 in float32 and row-wise Adagrad; P(value k) ~ 1/k. Each number of
tables has about as many ids a step in all (26 x 4096, 200 x 532) and the same rows in all (--rows, millions; about 300
bytes each for both sides). Sides take turns; times are medians, ratios are of medians of one run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.table import DynamicTable
from tessera.embedding.table_set import TableSet
from tessera.kernels.backend import backend
from tessera.kernels.records import Positions
from tessera.kernels.unique import positions_of, unique_inverse, unique_tables
from tessera.scripts.bench.timing import alternate

SHAPES = {26: 4096, 200: 532}  # tables and ids of each in a step
NEW = 0.01  # share of ids that no table has
PARTS = ("merge duplicates", "look up, touch, add", "gather", "update")

Parts = dict[str, list[float]]


def id_of(values: Tensor) -> Tensor:
    return values * -7046029254386353131  # odd, hence one to one: ids over all 64 bits, and none need be kept


class Shape:
    """So many tables of `values` rows each, and the batches of a number of steps."""

    def __init__(self, tables: int, rows: int) -> None:
        self.tables, self.ids, self.values = tables, SHAPES[tables], rows // tables
        groups = (Group("v", 16, 0.0), Group("w", 1, 0.0))
        names = [f"t{number}" for number in range(tables)]
        self.configs = [DynamicTableConfig(name, (name,), groups, RowOptimizer("rowwise_adagrad")) for name in names]
        self.bounds = torch.arange(tables + 1) * self.ids
        self.grads = torch.randn(tables * self.ids, 17)
        self._generator = torch.Generator().manual_seed(1)
        self._unseen = self.values

    def batch(self) -> Tensor:
        """Return flat ids of one step: int64 [tables * ids]."""
        count = self.tables * self.ids
        share = torch.rand(count, generator=self._generator, dtype=torch.float64)
        values = (self.values**share).long().clamp(max=self.values) - 1
        new = torch.rand(count, generator=self._generator) < NEW
        values[new] = self._unseen + torch.arange(int(new.sum()))
        self._unseen += int(new.sum())
        return id_of(values)

    def fill(self, add: Callable[[int, Tensor], object]) -> None:
        """Call add(table, ids) with all ids that tables begin with."""
        for table in range(self.tables):
            for part in torch.arange(self.values).split(1 << 16):
                add(table, id_of(part))


def set_step(shape: Shape, parts: Parts) -> Callable[[Tensor], None]:
    found = TableSet(shape.configs)
    order = torch.arange(shape.tables + 1)
    shape.fill(lambda table, ids: found.lookup(ids, (order > table) * ids.numel(), 0))

    def step(ids: Tensor) -> None:
        clock = Clock(parts)
        unique, inverse, counts, bounds = unique_tables(ids, shape.bounds)
        positions = Positions(*positions_of(inverse, counts))
        clock.note("merge duplicates")
        rows = found.lookup(unique, bounds, 1, counts)
        clock.note("look up, touch, add")
        found.gather(rows, inverse)
        clock.note("gather")
        found.update(rows, shape.grads, positions)
        clock.note("update")

    return step


def tables_step(shape: Shape, parts: Parts) -> Callable[[Tensor], None]:
    tables = [DynamicTable(config) for config in shape.configs]
    shape.fill(lambda table, ids: tables[table].lookup(ids, 0))
    grads = shape.grads.split(shape.ids)

    def step(ids: Tensor) -> None:
        clock = Clock(parts)
        merged = [unique_inverse(part) for part in ids.split(shape.ids)]
        clock.note("merge duplicates")
        rows = [table.lookup(own, 1, counts) for table, (own, _, counts) in zip(tables, merged, strict=True)]
        clock.note("look up, touch, add")
        for table, own, (_, inverse, _) in zip(tables, rows, merged, strict=True):
            table.gather(own, inverse)
        clock.note("gather")
        for table, own, (_, inverse, _), grad in zip(tables, rows, merged, grads, strict=True):
            table.update(own, grad, inverse)
        clock.note("update")

    return step


class Clock:
    """Notes how long each part of a step took."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._began = parts, time.perf_counter()

    def note(self, part: str) -> None:
        now = time.perf_counter()
        self._parts.setdefault(part, []).append(now - self._began)
        self._began = now


def further_batches(shape: Shape, step: Callable[[Tensor], None], rounds: int) -> Callable[[], None]:
    """Return a function that does a step on a further batch at each call. Two calls more than `rounds` are made."""
    batches = [shape.batch() for _ in range(rounds + 2)]
    return lambda: step(batches.pop())


def show(what: str, *columns: str) -> None:
    print(f"{what:<44}" + "".join(f"{column:>14}" for column in columns), flush=True)


def bench(tables: int, rows: int, rounds: int) -> tuple[Shape, Callable[[Tensor], None]]:
    """Print the times of a shape; return it and the set's step."""
    shape = Shape(tables, rows)
    parts: dict[str, Parts] = {"set": {}, "tables": {}}
    step = set_step(shape, parts["set"])
    works = {
        "set": further_batches(shape, step, rounds),
        "tables": further_batches(shape, tables_step(shape, parts["tables"]), rounds),
    }
    found = {name: time_ * 1e3 for name, time_ in alternate(works, rounds).items()}
    show(f"{tables} tables x {shape.ids} ids, {rows / 1e6:.1f} M rows", "set, ms", "tables, ms", "set / tables")
    for part in PARTS:
        ours, theirs = (statistics.median(parts[side][part][2:]) * 1e3 for side in ("set", "tables"))
        show(f"  {part}", f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}")
    show("  step", f"{found['set']:.2f}", f"{found['tables']:.2f}", f"{found['set'] / found['tables']:.2f}")
    return shape, step


def compare(sides: list[tuple[Shape, Callable[[Tensor], None]]], rounds: int) -> None:
    """Print what a set's step takes with one number of tables beside another, in turn."""
    found = alternate({shape.tables: further_batches(shape, step, rounds) for shape, step in sides}, rounds)
    show("sets in turn", "step, ms", "distinct ids", "of the first")
    first = sides[0][0].tables
    for shape, _ in sides:
        distinct = unique_tables(shape.batch(), shape.bounds)[0].numel()
        ratio = found[shape.tables] / found[first]
        show(f"  {shape.tables} tables", f"{found[shape.tables] * 1e3:.2f}", f"{distinct:,}", f"{ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1.3, help="millions, of all tables")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tables", type=int, nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, kernels {backend()}, one thread")
    sides = [bench(tables, int(arguments.rows * 1e6), arguments.rounds) for tables in arguments.tables]
    if len(sides) > 1:
        compare(sides, arguments.rounds)


if __name__ == "__main__":
    main()
