"""Measure a dynamic table, and a set of them, on one thread beside fbgemm's static ones, a dict and torchrec's MCH: one
table of figures.

    python scripts/bench/tables.py [--only step map growth bandwidth] [--repeat 30] [--growth 50]

A step is what training does with a batch: 26 features x 4096 ids, P(value k) ~ 1/k, merged to distinct ids, looked up
(the id map), counted and timed, gathered for every occurrence, and updated by row-wise Adagrad. Contenders take turns,
so that a machine that slows down slows all of them; times are medians, ratios are of medians of one run. --growth:
the growth run ends at so many million rows, at about 140 bytes each.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.table import DynamicTable
from tessera.embedding.table_set import TableSet
from tessera.kernels.backend import backend
from tessera.kernels.id_map import IdMap
from tessera.kernels.records import Positions
from tessera.kernels.unique import positions_of, unique_inverse, unique_tables
from tessera.scripts.bench.timing import alternate, seconds

FEATURES, BATCH, DIM = 26, 4096, 16
IDS = FEATURES * BATCH  # 106,496 per step
ROWS = FEATURES * 50_000  # 1.3 M
MILLION = 1_000_000
STEPS = 20  # different batches, one after the other

T = TypeVar("T")


def show(what: str, *columns: str) -> None:
    print(f"{what:<58}" + "".join(f"{column:>18}" for column in columns), flush=True)


def distinct_ids(count: int, seed: int = 0) -> torch.Tensor:
    """Return random 64-bit ids; two of some million are equal once in millions of runs."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def power_law_rows(rows: int, seed: int = 1) -> list[torch.Tensor]:
    """Return row numbers below `rows`, int64 [IDS], of STEPS steps: every feature has an equal part of the rows."""
    generator = torch.Generator().manual_seed(seed)
    values = rows // FEATURES
    offsets = (torch.arange(FEATURES) * values).repeat_interleave(BATCH)
    shares = [torch.rand(IDS, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    return [(values**share).long().clamp(max=values) - 1 + offsets for share in shares]


def in_turn(items: list[T], work: Callable[[T], object]) -> Callable[[], object]:
    """Return a function that calls `work` on the next item with every call."""
    turn = [0]

    def call() -> None:
        turn[0] += 1
        work(items[turn[0] % len(items)])

    return call


def empty_table(init_std: float = 0.01, optimizer: str = "rowwise_adagrad") -> DynamicTable:
    return DynamicTable(DynamicTableConfig("t", ("f",), (Group("v", DIM, init_std),), RowOptimizer(optimizer)))


def filled_table(ids: torch.Tensor) -> DynamicTable:
    table = empty_table(init_std=0.0)
    for part in ids.split(IDS):
        table.lookup(part, now=0)
    return table


def table_step(
    table: DynamicTable, grads: torch.Tensor, parts: dict[str, list[float]] | None = None
) -> Callable[[torch.Tensor], None]:
    """Return a function that does a training step's table work on the ids of one batch."""

    def step(ids: torch.Tensor) -> None:
        times = [time.perf_counter()]
        unique, inverse, counts = unique_inverse(ids)
        times.append(time.perf_counter())
        rows = table.lookup(unique, 1, counts)
        times.append(time.perf_counter())
        table.gather(rows, inverse)
        times.append(time.perf_counter())
        table.update(rows, grads, inverse)
        times.append(time.perf_counter())
        if parts is not None:
            for values, begin, end in zip(parts.values(), times[:-1], times[1:], strict=True):
                values.append(end - begin)

    return step


def set_step(ids: torch.Tensor, grads: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Return the same for a table of each feature, all in one set, that know their part of `ids`."""
    config = DynamicTableConfig("t", ("f",), (Group("v", DIM, 0.0),), RowOptimizer("rowwise_adagrad"))
    tables, order = TableSet([replace(config, name=f"t{i}") for i in range(FEATURES)]), torch.arange(FEATURES + 1)
    for table, known in enumerate(ids.split(ROWS // FEATURES)):
        for part in known.split(IDS):
            tables.lookup(part, (order > table) * part.numel(), 0)

    def step(asked: torch.Tensor) -> None:
        unique, inverse, counts, bounds = unique_tables(asked, order * BATCH)
        rows = tables.lookup(unique, bounds, 1, counts)
        tables.gather(rows, inverse)
        tables.update(rows, grads, Positions(*positions_of(inverse, counts)))

    return step


def fbgemm_step(tables: int) -> Callable[[torch.Tensor], object]:
    """Return forward and backward of fbgemm's static table(s) with SUM pooling; it is given row numbers."""
    import fbgemm_gpu.split_table_batched_embeddings_ops_training as training
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation

    spec = (ROWS // tables, DIM, EmbeddingLocation.HOST, training.ComputeDevice.CPU)
    module = training.SplitTableBatchedEmbeddingBagsCodegen(
        [spec] * tables,
        feature_table_map=[feature * tables // FEATURES for feature in range(FEATURES)],
        optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        device=torch.device("cpu"),
    )
    offsets, grad = torch.arange(IDS + 1), torch.randn(BATCH, FEATURES * DIM)
    return lambda rows: module(rows % (ROWS // tables), offsets).backward(grad)


def bench_step(repeat: int) -> None:
    ids, steps = distinct_ids(ROWS), power_law_rows(ROWS)
    parts: dict[str, list[float]] = {name: [] for name in ("merge duplicates", "look up, touch", "gather", "update")}
    asked, grads = [ids[step] for step in steps], torch.randn(IDS, DIM)
    works = {
        "tessera, dynamic table with id map": in_turn(asked, table_step(filled_table(ids), grads, parts)),
        f"tessera, set of {FEATURES} dynamic tables": in_turn(asked, set_step(ids, grads)),
        "fbgemm static SUM, 1 table": in_turn(steps, fbgemm_step(1)),
        f"fbgemm static SUM, {FEATURES} tables": in_turn(steps, fbgemm_step(FEATURES)),
    }
    found = alternate(works, repeat)
    one, together, *_ = found.values()
    distinct = statistics.mean(step.unique().numel() for step in steps) / IDS
    show(
        f"(a) step of {IDS:,} ids ({distinct:.0%} distinct), {ROWS / MILLION} M rows",
        "ms",
        "table / this",
        "set / this",
    )
    for name, time_ in found.items():
        show(f"  {name}", f"{time_ * 1e3:.2f}", f"{one / time_:.2f}", f"{together / time_:.2f}")
    for name, values in parts.items():
        show(f"    of the table: {name}", f"{statistics.median(values) * 1e3:.2f}")


def mch_remap(ids: torch.Tensor) -> Callable[[torch.Tensor], object]:
    """Return torchrec's managed collisions, with all ids admitted already."""
    from torchrec import JaggedTensor
    from torchrec.modules.mc_modules import DistanceLFU_EvictionPolicy, MCHManagedCollisionModule

    def feature(values: torch.Tensor) -> dict[str, JaggedTensor]:
        return {"f": JaggedTensor(values=values, lengths=torch.ones(values.numel(), dtype=torch.int32))}

    module = MCHManagedCollisionModule(
        zch_size=ids.numel() + 1,
        device=torch.device("cpu"),
        eviction_policy=DistanceLFU_EvictionPolicy(),
        eviction_interval=1,
        input_hash_size=2**62,
    )
    module.profile(feature(ids))
    module.eval()
    return lambda values: module.remap(feature(values))


def bench_map(repeat: int) -> None:
    ids = distinct_ids(ROWS) & (2**62 - 1)  # MCH wants to know a size of the ids
    asked = [ids[step] for step in power_law_rows(ROWS)]
    unique = [unique_inverse(step)[0] for step in asked]
    id_map = IdMap()
    dictionary: dict[int, int] = {}

    def insert_all() -> None:
        for part in ids.split(IDS):
            id_map.insert(part, torch.arange(part.numel()))

    insert = seconds(insert_all)
    keys = ids.tolist()
    insert_dict = seconds(lambda: dictionary.update(zip(keys, range(ROWS), strict=True)))
    missing = [distinct_ids(IDS, seed) for seed in range(STEPS)]
    gone = ids[: ROWS // 10]
    works = {
        "tessera": in_turn(unique, id_map.find),
        "tessera, ids it has not": in_turn(missing, id_map.find),
        "dict": in_turn([step.tolist() for step in unique], lambda step: [dictionary[key] for key in step]),
        "torchrec MCH remap": in_turn(unique, mch_remap(ids)),
    }
    found = alternate(works, repeat)
    count = statistics.mean(step.numel() for step in unique)
    counts = dict.fromkeys(works, count) | {"tessera, ids it has not": IDS}
    show(f"(b) id map, {ROWS / MILLION} M entries, {id_map.nbytes / ROWS:.0f} bytes each", "M ids/s", "ours / this")
    for name, time_ in found.items():
        speed = counts[name] / time_ / MILLION
        show(f"  find, {name}", f"{speed:.1f}", f"{count / found['tessera'] / MILLION / speed:.1f}")
    show("  insert from empty, tessera", f"{ROWS / insert / MILLION:.1f}")
    show("  insert from empty, dict", f"{ROWS / insert_dict / MILLION:.1f}", f"{insert_dict / insert:.1f}")
    show("  erase, tessera", f"{gone.numel() / seconds(lambda: id_map.erase(gone)) / MILLION:.1f}")


def id_of(number: torch.Tensor) -> torch.Tensor:
    return number * -7046029254386353131  # odd, hence one to one: ids over all 64 bits, and none need be kept


def bench_growth(top: float, repeat: int) -> None:
    """Measure steps of new ids only, up to `top` million rows; then steps of known ids on it and on a table of 1 M
    rows."""
    table, grads, rows = empty_table(), torch.randn(IDS, DIM), 0
    step, times = table_step(table, grads), []
    while rows < top * MILLION:
        ids = id_of(torch.arange(rows, rows + IDS))
        rows += IDS
        times.append(seconds(partial(step, ids)) * 1e3)
    times = times[MILLION // IDS :]  # from 1 M rows
    middle, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
    worst = max(range(len(times)), key=times.__getitem__)
    show(f"(c) growth from 1 M to {rows / MILLION:.0f} M rows, {IDS:,} new ids a step", "ms", "of median")
    show("  median step", f"{middle:.1f}", "1.00")
    show("  p99", f"{p99:.1f}", f"{p99 / middle:.2f}")
    show(f"  worst (step {worst} of {len(times)})", f"{times[worst]:.1f}", f"{times[worst] / middle:.2f}")
    show("  bytes per row, all included", f"{table.stats()['bytes_per_row']:.0f}")
    show("  step of known ids", f"{top:g} M, ms", "1 M, ms", "ratio")
    small = filled_table(id_of(torch.arange(MILLION)))
    generator = torch.Generator().manual_seed(4)
    batches = {
        "skewed as in (a), the same ids": [power_law_rows(MILLION)] * 2,
        "all rows of the table alike": [
            [torch.randint(0, count, (IDS,), generator=generator) for _ in range(STEPS)] for count in (rows, MILLION)
        ],
    }
    for name, pair in batches.items():
        works = {
            size: in_turn([id_of(batch) for batch in batches_], table_step(which, grads))
            for size, which, batches_ in zip(("large", "small"), (table, small), pair, strict=True)
        }
        found = alternate(works, max(repeat, 2 * STEPS))
        ratio = found["large"] / found["small"]
        show(f"    {name}", f"{found['large'] * 1e3:.1f}", f"{found['small'] * 1e3:.1f}", f"{ratio:.2f}")


def bench_bandwidth(repeat: int) -> None:
    """Measure distinct random rows: bytes read or written per second, beside torch's gather from one dense tensor."""
    ids, dense = distinct_ids(ROWS), torch.zeros(ROWS, DIM)
    picks = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(s))[:IDS] for s in range(STEPS)]
    table, grads, out = filled_table(ids), torch.randn(IDS, DIM), torch.empty(IDS, DIM)
    rows = [table.lookup(ids[pick], 0, training=False) for pick in picks]
    step = table_step(table, grads)
    works = {
        "index_select of one dense tensor": in_turn(picks, lambda pick: torch.index_select(dense, 0, pick, out=out)),
        "gather": in_turn(rows, table.gather),
        "row-wise Adagrad update": in_turn(rows, lambda row: table.update(row, grads)),
        "whole step with id map": in_turn([ids[pick] for pick in picks], step),
    }
    # A row of values is read; its update reads and writes it with its state; a step does both.
    floats = dict(zip(works, (DIM, DIM, 2 * (DIM + 1), DIM + 2 * (DIM + 1)), strict=True))
    found = alternate(works, repeat)
    rates = {name: IDS * 4 * floats[name] / time_ / 1e9 for name, time_ in found.items()}
    plain = next(iter(rates.values()))
    show(f"(d) {IDS:,} distinct random rows of {ROWS / MILLION} M, dim {DIM}", "ms", "GB/s of rows", "of the first")
    for name, time_ in found.items():
        show(f"  {name}", f"{time_ * 1e3:.2f}", f"{rates[name]:.2f}", f"{rates[name] / plain:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("step", "map", "growth", "bandwidth")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    parser.add_argument("--repeat", type=int, default=30, help="repetitions of every measurement")
    parser.add_argument("--growth", type=float, default=10.0, help="rows at the end of the growth run in millions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(f"kernels {backend()}, 1 thread, dim {DIM}, row-wise Adagrad, medians of {arguments.repeat}\n")
    for part in arguments.only:
        if part == "growth":
            bench_growth(arguments.growth, arguments.repeat)
        else:
            {"step": bench_step, "map": bench_map, "bandwidth": bench_bandwidth}[part](arguments.repeat)


if __name__ == "__main__":
    main()
