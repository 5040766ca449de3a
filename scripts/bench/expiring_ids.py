"""Thirty days with new ids every day: do rows and memory level off when ids expire?

    python scripts/bench/expiring_ids.py --output runs/expiring --days 30 --new-ids 0.2 --ttl-days 7

Writes synthetic data by day, trains DeepFM on one day after the other, expires at the end of each day, and prints rows
and bytes by day; the run's report shows the curve, and AUC and logloss on the day that follows. With --ttl-days 0
nothing expires, for comparison.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process
from tessera.distributed.threads import restart_with_idle_threads_asleep


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="hydra overrides")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data and the run")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--rows", type=int, default=30_000, help="rows of one day")
    parser.add_argument("--new-ids", type=float, default=0.2, help="share of ids replaced every day")
    parser.add_argument("--ttl-days", type=float, default=7)
    options = parser.parse_args()
    data = options.output / "data"
    if not data.exists():
        count = options.days + 1
        write_synthetic(SyntheticConfig(rows=options.rows * count, days=count, new_ids=options.new_ids), data)
    *days, following = sorted(folder.name.removeprefix("day=") for folder in data.glob("day=*"))

    def load() -> tuple[Config, str, float]:
        ttl = options.ttl_days or "null"
        fixed = [
            "experiment=demo",
            "optimizer=adam_adagrad",
            f"data.path={data}",
            "data.train=.",
            "data.valid=null",
            f"data.test='day={following}'",
            f"embedding.ttl_days={ttl}",
            "trainer.eval_every=null",
            f"trainer.run_dir={options.output}/ttl-{ttl}",
        ]
        return load_config([*fixed, *options.overrides], ""), "cpu", 600.0

    return run(load, lambda config, process: train_days(config, process, days))


def train_days(config: Config, process: Process, days: list[str]) -> None:
    trainer = Trainer(config, process)
    tables = trainer.engine.dynamic
    assert tables is not None
    print(f"{'day':<12}{'rows':>12}{'MiB':>8}{'admitted':>12}{'expired':>12}{'seconds':>9}")
    before: dict[str, float] = {"admitted": 0, "expired": 0}
    for day in days:
        began = time.perf_counter()
        reader = ParquetReader(config.data.path, trainer.engine.schema, config.trainer.batch_size, days=[day])
        for batch in reader.epoch(0):
            loss_sum, weight = trainer.engine.train_step(batch)
            trainer.log.train(trainer.engine, batch, loss_sum, weight)
        for table in tables.owned().values():
            table.expire(trainer.progress.now)
        stats = tables.stats()
        trainer.log.tables(trainer.engine.step, stats)
        total = {key: sum(table[key] for table in stats.values()) for key in ("rows", "bytes", *before)}
        print(f"{day:<12}{total['rows']:>12,}{total['bytes'] / 2**20:>8.1f}", end="")
        print("".join(f"{total[key] - before[key]:>12,}" for key in before), end="")
        print(f"{time.perf_counter() - began:>9.1f}", flush=True)
        before = {key: total[key] for key in before}
    trainer.report()


if __name__ == "__main__":
    restart_with_idle_threads_asleep()  # as training runs
    sys.exit(main())
