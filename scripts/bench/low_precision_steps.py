"""Measure the time of a table's step and of a whole training step by row format, one thread, medians of alternating
rounds.

    python scripts/bench/low_precision_steps.py [--rounds 20] [--only table training]

table: distinct ids, look-up, gather and row-wise Adagrad update of 106,496 ids (26 features of 50,000 Zipf values).
training: DeepFM's step on preloaded synthetic batches (4096 rows, 26 ids, dim 16, MLP 400 x 3); ALPT with k = 8 is the
mean over eight steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process
from tessera.distributed.threads import restart_with_idle_threads_asleep
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.optim import RowOptimizer, ScaleOptimizer
from tessera.embedding.table import DynamicTable
from tessera.kernels.unique import unique_inverse

FEATURES, BATCH, VALUES = 26, 4096, 50_000
FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "int2")
RUNS = {
    "fp32": [],
    "bf16": ["embedding.format=bf16"],
    "int8 LPT": ["embedding.format=int8"],
    "int8 ALPT, k = 8": ["embedding.format=int8", "embedding.alpt.every=8"],
    "int8 ALPT, k = 1": ["embedding.format=int8", "embedding.alpt.every=1"],
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=20)
parser.add_argument("--only", nargs="+", choices=("table", "training"), default=("table", "training"))
options = parser.parse_args()


def alternate(works: dict[str, Callable[[], None]], calls: int) -> dict[str, float]:
    """Return median milliseconds per call over rounds that take the works in turn, `calls` calls each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(options.rounds):
        for name, work in works.items():
            began = time.perf_counter()
            for _ in range(calls):
                work()
            times[name].append((time.perf_counter() - began) / calls * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, medians: dict[str, float]) -> None:
    base = medians["fp32"]
    print(f"{title:<40}{'ms':>8}{'of fp32':>10}")
    for name, milliseconds in medians.items():
        print(f"  {name:<38}{milliseconds:>8.2f}{milliseconds / base:>10.2f}", flush=True)


def zipf_steps(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = (torch.arange(FEATURES) * VALUES).repeat_interleave(BATCH)
    share = torch.rand((count, FEATURES * BATCH), generator=generator, dtype=torch.float64)
    values = (VALUES**share).long().clamp(max=VALUES) - 1
    return list((values + features) * 0x9E3779B97F4A7 + 12345)


def table_step(group: Group, steps: list[torch.Tensor]) -> Callable[[], None]:
    table = DynamicTable(DynamicTableConfig("t", ("f",), (group,), RowOptimizer(lr=0.01)))
    for ids in (torch.arange(FEATURES * VALUES) * 0x9E3779B97F4A7 + 12345).split(FEATURES * BATCH):
        table.lookup(ids, 0)
    grads, turn = torch.randn(FEATURES * BATCH, group.dim), [0]

    def work() -> None:
        turn[0] += 1
        ids, inverse, counts = unique_inverse(steps[turn[0] % len(steps)])
        rows = table.lookup(ids, turn[0], counts)
        table.gather(rows, inverse)
        if group.learned is None:
            table.update(rows, grads, inverse, ids=ids)
            return
        ahead = table.begin_update(rows, grads, inverse, ids=ids)
        ahead.gather(inverse)
        ahead.learn(grads, inverse)

    return work


def bench_tables() -> None:
    torch.set_num_threads(1)
    steps = zipf_steps(20)
    for dim in (16, 64):
        works = {format: table_step(Group("v", dim, 0.01, format), steps) for format in FORMATS}
        works["int8 nearest"] = table_step(Group("v", dim, 0.01, "int8", "nearest"), steps)
        works["int8 ALPT, both passes"] = table_step(Group("v", dim, 0.01, "int8", learned=ScaleOptimizer()), steps)
        show(f"table step, dim {dim}", alternate(works, calls=1))


def training_step(trainer: Trainer, batches: list) -> Callable[[], None]:
    def work() -> None:
        trainer.engine.train_step(batches[trainer.engine.step % len(batches)])

    return work


def bench_training(config: Config, process: Process) -> None:
    works = {}
    assert config.trainer.run_dir is not None
    folder, path = Path(config.trainer.run_dir), config.data.path
    batches = None
    for number, (name, overrides) in enumerate(RUNS.items()):
        one = config_of(path, folder / str(number), *overrides)
        trainer = Trainer(one, process)
        if batches is None:
            batches = [batch for batch in trainer.readers.train.epoch(0) if batch.rows == BATCH]
        works[name] = training_step(trainer, batches)
        trainer.log.close()
    show("training step of DeepFM", alternate(works, calls=8))


def config_of(path: str, run_dir: Path, *overrides: str) -> Config:
    fixed = ["data=synthetic", f"data.path={path}", f"trainer.run_dir={run_dir}", "trainer.threads=1"]
    fixed += ["optimizer.sparse.name=rowwise_adagrad", "optimizer.sparse.lr=0.05"]
    return load_config([*fixed, "trainer.device=cpu", "trainer.log_every=1000000", *overrides], "")


def main() -> int:
    if "table" in options.only:
        bench_tables()
    if "training" not in options.only:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(SyntheticConfig(rows=80_000), Path(folder) / "data")
        return run(lambda: (config_of(f"{folder}/data", Path(folder) / "runs"), "cpu", 60.0), bench_training)


if __name__ == "__main__":
    restart_with_idle_threads_asleep()  # as training runs
    sys.exit(main())
