"""Measure training steps with tables on the host and a cache on the device, beside tables that are on the device as a
whole.

`python scripts/bench/cache.py [--device cuda] [--cache-rows 20000 100000]`: DeepFM, Criteo-shaped synthetic data with
skewed ids, batches preloaded, one process. Rounds take the contenders in turn, so that a machine that slows down slows
all of them; figures are medians over rounds. Each cache runs twice: with the rows of the next batch brought while a
step is trained, and with every step waiting for its own. On the CPU both sides are one memory and one set of cores: the
run shows what the cache costs there, not what it saves.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.runs.log import versions
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process
from tessera.distributed.threads import restart_with_idle_threads_asleep

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--steps", type=int, default=8, help="steps per round")
parser.add_argument("--batch", type=int, default=4096)
parser.add_argument("--cache-rows", type=int, nargs="+", default=[9_000, 20_000], help="rows of each table's cache")
parser.add_argument("--format", default="fp32", help="how rows are stored")
options = parser.parse_args()


class Contender:
    def __init__(self, config: Config, process: Process, cache_rows: int | None, *, ahead: bool) -> None:
        self.name = "no cache" if cache_rows is None else f"cache of {cache_rows:,} rows a table"
        self.how = "" if cache_rows is None else "ahead" if ahead else "in the step"
        config.embedding.cache_rows = cache_rows
        config.trainer.run_dir = f"{config.trainer.run_dir}-{cache_rows}-{ahead}"
        self.trainer, self._ahead = Trainer(config, process), ahead
        tables = self.trainer.engine.dynamic
        assert tables is not None
        self.tables = tables
        self.milliseconds: list[float] = []
        self.hit_rates: list[float] = []
        self.moved: list[float] = []
        self.waited: list[float] = []
        self.busy: list[float] = []

    def start(self) -> None:
        batches = [batch for batch in self.trainer.readers.train.epoch(0) if batch.rows == options.batch]
        self._batches: Iterator[Batch] = itertools.cycle(batches)
        if self._ahead:
            self._batches = self.trainer.engine.pipeline.feed(self._batches, begins=True)
        for _ in batches:  # once over all: from then on the table does not grow
            self.trainer.engine.train_step(next(self._batches))
        self.tables.cache_stats()

    def round(self) -> None:
        began = time.perf_counter()
        for _ in range(options.steps):
            self.trainer.engine.train_step(next(self._batches))
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.milliseconds.append(seconds / options.steps * 1e3)
        stats = self.tables.cache_stats()
        if stats is not None:
            hits, misses, back = (
                sum(one[key] for one in stats.by_table.values()) for key in ("hits", "misses", "written_back")
            )
            self.hit_rates.append(hits / (hits + misses))
            self.moved.append((misses + back) / options.steps)
            self.waited.append(stats.waited_seconds / seconds)
            self.busy.append(stats.busy_seconds / seconds)


def bench(config: Config, process: Process) -> None:
    cases = [(None, False), *((rows, ahead) for rows in options.cache_rows for ahead in (True, False))]
    contenders, run_dir = [], config.trainer.run_dir
    assert run_dir is not None
    for cache_rows, ahead in cases:
        own = load(config.data.path, run_dir)[0]
        contenders.append(Contender(own, process, cache_rows, ahead=ahead))
        contenders[-1].start()
    for _ in range(options.rounds):
        for one in contenders:
            one.round()
    rows = [table["rows"] for table in contenders[0].tables.stats().values()]
    installed = versions()
    print(
        f"\nDeepFM, batch {options.batch}, {len(rows)} tables of {sum(rows):,.0f} rows, the largest {max(rows):,.0f}, "
        f"dim 16, {options.format}; {options.device}, {options.threads} thread(s), torch {installed['torch']}, "
        f"median of {options.rounds} rounds of {options.steps} steps\n"
        "moved: rows in and out per step; waited: share of the time in which steps waited for rows; busy: share in "
        "which the thread worked\n"
    )
    print(
        f"{'':<32}{'rows brought':>14}{'ms/step':>10}{'samples/s':>12}{'hits':>8}{'moved':>10}{'waited':>9}{'busy':>7}"
    )
    for one in contenders:
        one.trainer.log.close()
        middle = statistics.median(one.milliseconds)
        line = f"{one.name:<32}{one.how:>14}{middle:>10.1f}{options.batch / middle * 1e3:>12,.0f}"
        if one.hit_rates:
            hits, moved, waited, busy = map(statistics.median, (one.hit_rates, one.moved, one.waited, one.busy))
            line += f"{hits:>8.1%}{moved:>10,.0f}{waited:>9.0%}{busy:>7.0%}"
        print(line)


def load(data: str, run_dir: str) -> tuple[Config, str, float]:
    overrides = [
        "data=synthetic",
        "optimizer.sparse.name=rowwise_adagrad",
        "optimizer.sparse.lr=0.05",
        f"data.path={data}",
        f"trainer.run_dir={run_dir}",
        f"trainer.batch_size={options.batch}",
        f"trainer.threads={options.threads}",
        f"trainer.device={options.device}",
        f"embedding.format={options.format}",
        "trainer.log_every=1000000",
    ]
    return load_config(overrides, ""), options.device, 60.0


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(SyntheticConfig(rows=options.batch * 30), Path(folder) / "data")
        return run(lambda: load(f"{folder}/data", f"{folder}/run"), bench)


if __name__ == "__main__":
    restart_with_idle_threads_asleep()  # as training runs
    sys.exit(main())
