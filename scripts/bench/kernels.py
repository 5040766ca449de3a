"""Measure the table kernels on one thread: medians, and ratios to what else does the same job in one run.

    python scripts/bench/kernels.py [--entries 1 20] [--repeat 30] [--only id_map unique rows step growth]
                                    [--growth 50]

--entries: sizes of the id map in millions; --growth: the growth run ends at so many million rows (it takes
about 130 bytes per row). Other work on the machine shows in the absolute numbers and less in the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels.backend import backend  # noqa: E402
from kernels.chunks import allocate_chunk  # noqa: E402
from kernels.gather import gather  # noqa: E402
from kernels.id_map import IdMap  # noqa: E402
from kernels.initialise import init_rows  # noqa: E402
from kernels.touch import touch  # noqa: E402
from kernels.unique import unique_inverse  # noqa: E402
from kernels.update import state_width, update  # noqa: E402

FEATURES, BATCH, DIM = 26, 4096, 16
IDS = FEATURES * BATCH  # 106,496 ids per step
ROWS = FEATURES * 50_000
CHUNK_ROWS = 1 << 18
MILLION = 1_000_000


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def alternate(repeat: int, **works: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each of several works, run in turn so that disturbances meet them alike."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def show(what: str, *columns: str) -> None:
    print(f"{what:44s}" + "".join(f"{column:>22s}" for column in columns), flush=True)


def distinct_ids(count: int) -> torch.Tensor:
    """Random 64-bit ids; two of some million are equal once in millions of runs."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(0))


def zipf_steps(steps: int) -> list[torch.Tensor]:
    """Row numbers [IDS] for each step: 26 features of 50,000 values, P(value k) ~ 1 / k."""
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


def bench_id_map(entries: int, repeat: int) -> None:
    count, asked = int(entries * MILLION), 1_000_000
    ids, rows = distinct_ids(count), torch.arange(count)
    id_map, dictionary = IdMap(), {}
    insert = seconds(lambda: [id_map.insert(i, r) for i, r in zip(ids.split(IDS), rows.split(IDS), strict=True)])
    keys = ids.tolist()
    insert_dict = seconds(lambda: dictionary.update(zip(keys, range(count), strict=True)))
    chosen = torch.randint(0, count, (asked,))
    known, unknown = ids[chosen], distinct_ids(count + asked)[count:]
    known_keys = known.tolist()
    found = alternate(
        repeat,
        find=lambda: id_map.find(known),
        miss=lambda: id_map.find(unknown),
        python=lambda: [dictionary[key] for key in known_keys],
    )
    gone = ids[: asked // 10]
    gone_keys = gone.tolist()
    erase, erase_dict = [], []
    for _ in range(max(3, repeat // 3)):
        erase.append(seconds(lambda: id_map.erase(gone)))
        id_map.insert(gone, rows[: gone.numel()])
        erase_dict.append(seconds(lambda: [dictionary.pop(key) for key in gone_keys]))
        dictionary.update(zip(gone_keys, range(len(gone_keys)), strict=True))

    def speed(number: int, time_: float) -> str:
        return f"{number / time_ / MILLION:.1f} M/s"

    title = f"id map, {entries:g} M entries, {id_map.nbytes / count:.0f} B each"
    show(title, "tessera", "dict")
    show("  insert from empty", speed(count, insert), speed(count, insert_dict))
    show("  find, known ids", speed(asked, found["find"]), speed(asked, found["python"]))
    show("  find, unknown ids", speed(asked, found["miss"]), "")
    show(
        "  erase",
        speed(len(gone_keys), statistics.median(erase)),
        speed(len(gone_keys), statistics.median(erase_dict)),
    )


def bench_unique(repeat: int) -> None:
    steps = zipf_steps(20)
    turn = {"ours": 0, "torch": 0}

    def of_turn(name: str) -> torch.Tensor:
        turn[name] += 1
        return steps[turn[name] % len(steps)]

    found = alternate(
        repeat,
        ours=lambda: unique_inverse(of_turn("ours")),
        torch=lambda: torch.unique(of_turn("torch"), return_inverse=True, return_counts=True),
    )
    share = unique_inverse(steps[0])[0].numel() / IDS
    show(f"unique + inverse + counts, {share:.0%} distinct", "tessera", "torch.unique")
    show(f"  {IDS:,} ids", f"{found['ours'] * 1e3:.2f} ms", f"{found['torch'] * 1e3:.2f} ms")


def bench_rows(repeat: int) -> None:
    """Random rows, all distinct: bytes of the rows that are read or written, per second."""
    dense = torch.zeros(ROWS, DIM)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randperm(ROWS, generator=generator)[:IDS]
    out, grads = torch.empty(IDS, DIM), torch.randn(IDS, DIM)
    tables = {name: empty_table(ROWS, DIM + state_width(name, DIM)) for name in ("rowwise_adagrad", "adam")}
    found = alternate(
        repeat,
        plain=lambda: torch.index_select(dense, 0, rows, out=out),
        gather=lambda: gather(tables["rowwise_adagrad"], rows, DIM),
        rowwise_adagrad=lambda: update("rowwise_adagrad", tables["rowwise_adagrad"], rows, grads, learning_rate=0.1),
        adam=lambda: update("adam", tables["adam"], rows, grads, learning_rate=0.1),
    )
    plain = IDS * DIM * 4 / found["plain"] / 1e9
    show(f"{IDS:,} random rows of {ROWS / MILLION:.1f} M, dim {DIM}", "time", "GB/s", "of plain gather")
    bytes_of = {"plain": DIM * 4, "gather": DIM * 4}
    for name, chunks in tables.items():
        bytes_of[name] = 2 * chunks[0].shape[1] * 4
    for name, time_ in found.items():
        rate = IDS * bytes_of[name] / time_ / 1e9
        label = {"plain": "index_select of one dense table", "gather": "gather"}.get(name, f"update {name}")
        show(f"  {label}", f"{time_ * 1e3:.2f} ms", f"{rate:.2f}", f"{rate / plain:.2f}")


def fbgemm_step(tables: int, steps: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], object] | None:
    """Forward and backward of fbgemm's static table(s) with SUM pooling, or None where it is missing."""
    try:
        import fbgemm_gpu.split_table_batched_embeddings_ops_training as training
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    except ImportError:
        return None
    spec = (ROWS // tables, DIM, EmbeddingLocation.HOST, training.ComputeDevice.CPU)
    module = training.SplitTableBatchedEmbeddingBagsCodegen(
        [spec] * tables,
        feature_table_map=[feature * tables // FEATURES for feature in range(FEATURES)],
        optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        device=torch.device("cpu"),
    )
    offsets, turn = torch.arange(IDS + 1), [0]
    local = [step % (ROWS // tables) for step in steps]

    def work() -> None:
        turn[0] += 1
        module(local[turn[0] % len(local)], offsets).backward(grad)

    return work


def bench_step(repeat: int) -> None:
    """Look-up and row-wise Adagrad update of a step, with unique and id map; fbgemm is given row numbers."""
    steps = zipf_steps(20)
    ids = distinct_ids(ROWS)
    id_map = IdMap()
    id_map.insert(ids, torch.randperm(ROWS, generator=torch.Generator().manual_seed(3)))
    chunks = empty_table(ROWS, DIM + 1)
    raw = [ids[step] for step in steps]
    grad = torch.randn(BATCH, FEATURES * DIM)
    grads, none = torch.randn(IDS, DIM), torch.empty(0, dtype=torch.int64)
    turn, parts = [0], {name: [] for name in ("unique", "id map", "gather", "update")}

    def ours() -> None:
        turn[0] += 1
        times = [time.perf_counter()]
        unique, inverse, _ = unique_inverse(raw[turn[0] % len(raw)])
        times.append(time.perf_counter())
        rows, _ = id_map.find_or_insert(unique, none)
        times.append(time.perf_counter())
        gather(chunks, rows, DIM, inverse)
        times.append(time.perf_counter())
        update("rowwise_adagrad", chunks, rows, grads, inverse, learning_rate=0.01)
        times.append(time.perf_counter())
        for name, begin, end in zip(parts, times[:-1], times[1:], strict=True):
            parts[name].append(end - begin)

    works = {"ours": ours}
    for tables in (1, FEATURES):
        work = fbgemm_step(tables, steps, grad)
        if work is not None:
            works[f"fbgemm, {tables} table(s)"] = work
    found = alternate(repeat, **works)
    show(f"step: {IDS:,} ids, {ROWS / MILLION:.1f} M rows, dim {DIM}", "time", "ours / this")
    for name, time_ in found.items():
        show(f"  {name}", f"{time_ * 1e3:.2f} ms", f"{found['ours'] / time_:.2f}")
    for name, values in parts.items():
        show(f"    {name}", f"{statistics.median(values) * 1e3:.2f} ms")


class GrowingTable:
    """All that a table does for a batch, without the rules of admission and expiry."""

    def __init__(self) -> None:
        self.id_map = IdMap()
        self.values: list[torch.Tensor] = []
        self.meta: list[torch.Tensor] = []

    def step(self, ids: torch.Tensor, grads: torch.Tensor, now: int) -> None:
        unique, inverse, counts = unique_inverse(ids)
        known = len(self.id_map)
        rows, new = self.id_map.find_or_insert(unique, torch.arange(known, known + unique.numel()))
        while len(self.values) * CHUNK_ROWS < len(self.id_map):
            self.values.append(allocate_chunk((CHUNK_ROWS, DIM + 1)))
            self.meta.append(allocate_chunk((CHUNK_ROWS, 2), torch.int64))
        if new.numel():
            init_rows(
                self.values,
                rows[new],
                unique[new],
                DIM,
                distribution="uniform",
                offset=-0.01,
                scale=0.02,
                seed=0,
                table=0,
            )
        gather(self.values, rows, DIM, inverse)
        update("rowwise_adagrad", self.values, rows, grads, inverse, learning_rate=0.01)
        touch(self.meta, rows, now, counts)


def bench_growth(top: float) -> None:
    """Steps of new ids only, up to `top` million rows; then steps of known ids at the first and last size."""
    table, grads, generator = GrowingTable(), torch.randn(IDS, DIM), torch.Generator().manual_seed(4)

    def new_ids() -> torch.Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (IDS,), generator=generator)

    def known_step() -> float:
        """Median of steps on ids seen before: the same 1 M at any size, and drawn from all of them."""
        drawn = [seen[int(k)] for k in torch.randint(0, len(seen), (200,), generator=generator)]
        every = torch.cat(drawn)
        picks = [every[torch.randint(0, every.numel(), (IDS,), generator=generator)] for _ in range(20)]
        return statistics.median(seconds(lambda pick=pick: table.step(pick, grads, 0)) for pick in picks)

    seen: list[torch.Tensor] = []
    while len(table.id_map) < MILLION:
        seen.append(new_ids())
        table.step(seen[-1], grads, 0)
    small, times = known_step(), []
    while len(table.id_map) < top * MILLION:
        seen.append(new_ids())
        times.append(seconds(lambda: table.step(seen[-1], grads, len(times))))
    large = known_step()
    times = [t * 1e3 for t in times]
    cut = statistics.quantiles(times, n=100)[98]
    middle = statistics.median(times)
    rows = len(table.id_map)
    worst = max(range(len(times)), key=times.__getitem__)
    in_use = (table.id_map.nbytes + rows * (DIM + 1 + 4) * 4) / rows
    show(f"growth 1 M to {rows / MILLION:.0f} M rows, {IDS:,} new ids a step", "median", "p99", "worst")
    show("  step", f"{middle:.1f} ms", f"{cut:.1f} ms", f"{times[worst]:.1f} ms (step {worst})")
    show("  p99 / median", f"{cut / middle:.2f}")
    show("  bytes per row: map, values, state, meta", f"{in_use:.0f}")
    show(
        "  step of known ids at 1 M / at the end",
        f"{small * 1e3:.1f} ms",
        f"{large * 1e3:.1f} ms",
        f"ratio {large / small:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the table kernels on one thread.")
    parts = ("id_map", "unique", "rows", "step", "growth")
    parser.add_argument("--entries", type=float, nargs="+", default=[1.0], help="sizes of the id map in millions")
    parser.add_argument("--repeat", type=int, default=30, help="repetitions of every measurement")
    parser.add_argument("--growth", type=float, default=5.0, help="rows at the end of the growth run in millions")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"backend {backend()}, torch {torch.__version__}, 1 thread, {arguments.repeat} repetitions, medians")
    if "id_map" in arguments.only:
        for entries in arguments.entries:
            bench_id_map(entries, arguments.repeat)
    if "unique" in arguments.only:
        bench_unique(arguments.repeat)
    if "rows" in arguments.only:
        bench_rows(arguments.repeat)
    if "step" in arguments.only:
        bench_step(arguments.repeat)
    if "growth" in arguments.only:
        bench_growth(arguments.growth)


if __name__ == "__main__":
    main()
