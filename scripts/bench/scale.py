"""Measure how training grows with cores: one rank pinned to one core, one rank with two threads, two ranks.

    python scripts/bench/scale.py [--models deepfm,autoint_plus] [--rounds 3] [--steps 12] [--batch 8192] [--bf16]

Whole steps from parquet, Criteo-shaped (13 numeric and 26 id fields, dim 16, MLP 400x3), the same batch over all ranks
in each case, so that all train the same model. Each case is a job of its own by torchrun; cases take turns.
Samples per second are medians over rounds of the median step, ratios are to the pinned rank. Run it where nothing
else runs: a second rank needs the second core whole.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process

WARM_UP = 4  # steps


class Case(NamedTuple):
    name: str
    ranks: int
    threads: int
    cores: int


CASES = (Case("1 rank on 1 core", 1, 1, 1), Case("1 rank, 2 threads", 1, 2, 2), Case("2 ranks", 2, 1, 2))


def train(config: Config, process: Process, steps: int) -> None:
    """Train so many steps and print the median seconds of one."""
    trainer = Trainer(config, process)
    batches = (batch for epoch in range(1 << 20) for batch in trainer.readers.train.epoch(epoch))
    taken = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        trainer.engine.train_step(next(batches))
        taken.append(time.perf_counter() - began)
    if process.is_main:
        print(f"seconds {statistics.median(taken[WARM_UP:])}", flush=True)
    trainer.log.close()


def overrides(data: str, folder: str, model: str, batch: int, threads: int, *, amp: bool) -> list[str]:
    found = ["data=synthetic", f"data.path={data}", f"trainer.run_dir={folder}", f"model={model}", "trainer.device=cpu"]
    found += [f"trainer.batch_size={batch}", f"trainer.threads={threads}", f"trainer.amp={str(amp).lower()}"]
    return [*found, "trainer.log_every=1000000", "data.lanes=4", "data.window_rows=8192", "export.check=never"]


def seconds_of(case: Case, model: str, data: Path, options: argparse.Namespace) -> float:
    """Return seconds of a step of one job."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    own = [__file__, "--models", model, "--steps", str(options.steps), "--batch", str(options.batch)]
    own += ["--worker", str(data), "--threads", str(case.threads)] + ["--bf16"] * options.bf16
    cores = sorted(os.sched_getaffinity(0))[: case.cores]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*launcher, *own],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),  # ranks and all their threads inherit it
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
    if done.returncode or not lines:
        raise SystemExit(f"{case.name}: {done.stderr.strip().splitlines()[-1:]}")
    return float(lines[-1].split()[1])


def measure(options: argparse.Namespace, data: Path) -> None:
    print(f"{'':<16}" + "".join(f"{case.name:>20}" for case in CASES) + "   samples/s, and times the first")
    for model in options.models.split(","):
        taken: dict[Case, list[float]] = {case: [] for case in CASES}
        for _ in range(options.rounds):
            for case in CASES:
                taken[case].append(seconds_of(case, model, data, options))
        rates = [options.batch / statistics.median(taken[case]) for case in CASES]
        print(f"{model:<16}" + "".join(f"{rate:>12,.0f} ({rate / rates[0]:.2f})" for rate in rates), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="deepfm,dcn_v2,autoint_plus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of a job, behind four that are not measured")
    parser.add_argument("--batch", type=int, default=8192, help="rows of a step, over all ranks")
    parser.add_argument("--bf16", action="store_true", help="dense layers in bfloat16")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.worker is None:
            write_synthetic(SyntheticConfig(rows=200_000), Path(folder) / "data")
            measure(options, Path(folder) / "data")
            return 0
        made = overrides(options.worker, folder, options.models, options.batch, options.threads, amp=options.bf16)
        return run(
            lambda: (load_config(made, ""), "cpu", 60.0), lambda one, process: train(one, process, options.steps)
        )


if __name__ == "__main__":
    sys.exit(main())
