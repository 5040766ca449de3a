"""Measure training steps per second of DeepFM, Criteo-shaped: ours whole, our dense tower alone, and plain torch.

`python scripts/bench/train_step.py`: batch 4096, 13 numeric and 26 id fields, dim 16, MLP 400x3, one process, one
table. Rounds take the contenders in turn, so that a machine that slows down slows all of them; the figure is the
median over rounds. "Plain torch" is what most public code does: nn.Embedding tables and one Adam over everything.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.models.deepfm import DeepFM
from tessera.ctr.models.tower import Fields
from tessera.ctr.runs.log import versions
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process
from tessera.distributed.threads import restart_with_idle_threads_asleep
from tessera.scripts.bench.timing import alternate

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--steps", type=int, default=8, help="steps per round")
parser.add_argument("--rows", type=int, default=100_000, help="rows per table")
options = parser.parse_args()
BATCH, DIM, NUMERIC, IDS, HIDDEN = 4096, 16, 13, 26, (400, 400, 400)


class PlainTorch(torch.nn.Module):
    """DeepFM over nn.Embedding; Adam moves every row of every table in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower()
        self.v = torch.nn.ModuleList(torch.nn.Embedding(options.rows, DIM) for _ in range(IDS))
        self.w = torch.nn.ModuleList(torch.nn.Embedding(options.rows, 1) for _ in range(IDS))

    def forward(self, numeric_bn: torch.Tensor, ids_bf: torch.Tensor) -> torch.Tensor:
        embeddings = {
            name: torch.stack([table(ids_bf[:, f]) for f, table in enumerate(tables)], 1)
            for name, tables in (("v", self.v), ("w", self.w))
        }
        return self.tower(numeric_bn, embeddings)


def tower() -> DeepFM:
    names = Fields(tuple(f"I{i}" for i in range(NUMERIC)), tuple(f"C{i}" for i in range(IDS)))
    return DeepFM(names, DIM, HIDDEN, dropout=0.0, batch_norm=False)


def plain_torch_step() -> Callable[[], None]:
    model = PlainTorch()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    numeric, ids = torch.rand(BATCH, NUMERIC), torch.randint(0, options.rows, (BATCH, IDS))
    labels = torch.randint(0, 2, (BATCH,)).float()

    def step() -> None:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(numeric, ids), labels).backward()
        optimizer.step()

    return step


def tower_alone_step(*, amp: bool) -> Callable[[], None]:
    model = tower()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    numeric, labels = torch.rand(BATCH, NUMERIC), torch.randint(0, 2, (BATCH,)).float()
    embeddings = {n: torch.rand(BATCH, IDS, d, requires_grad=True) for n, d in model.embedding_dims.items()}

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = model(numeric, embeddings)
        F.binary_cross_entropy_with_logits(logits.float(), labels).backward()
        optimizer.step()

    return step


def our_step(trainer: Trainer, batches: list | None, *, amp: bool) -> Callable[[], None]:
    """Return a training step on preloaded batches, or from parquet with `batches` None."""

    def endless() -> Iterator[Batch]:
        while True:
            yield from batches if batches is not None else trainer.readers.train.epoch(0)

    source = endless()

    def step() -> None:
        trainer.engine.model.module.amp = amp
        trainer.engine.train_step(next(source))

    return step


def bench(config: Config, process: Process) -> None:
    trainer = Trainer(config, process)
    full = [batch for batch in trainer.readers.train.epoch(0) if batch.rows == BATCH]
    contenders = {
        "ours, from parquet": our_step(trainer, None, amp=False),
        "ours, preloaded": our_step(trainer, full, amp=False),
        "tower alone, preloaded": tower_alone_step(amp=False),
        "plain torch, preloaded": plain_torch_step(),
        "ours, from parquet, bf16": our_step(trainer, None, amp=True),
        "tower alone, preloaded, bf16": tower_alone_step(amp=True),
    }
    medians = {name: 1e3 * s for name, s in alternate(contenders, options.rounds, options.steps).items()}
    trainer.log.close()
    installed = versions()
    print(
        f"\nDeepFM, batch {BATCH}, {NUMERIC} + {IDS} fields, dim {DIM}, MLP {HIDDEN}, {options.rows:,} rows per table, "
        f"{options.threads} thread(s), median of {options.rounds} rounds of {options.steps} steps\n"
        f"{_processor()}, Python {installed['python']}, torch {installed['torch']}, torchrec {installed['torchrec']}\n"
    )
    base = medians["tower alone, preloaded"]
    print(f"{'':<30}{'ms/step':>10}{'samples/s':>12}{'of tower alone':>16}")
    for name, milliseconds in medians.items():
        print(f"{name:<30}{milliseconds:>10.1f}{BATCH / milliseconds * 1e3:>12,.0f}{base / milliseconds:>16.2f}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(SyntheticConfig(rows=200_000), Path(folder) / "data")

        def load() -> tuple[Config, str, float]:
            config = load_config(
                [
                    "data=synthetic",
                    "optimizer.sparse.name=rowwise_adagrad",
                    "optimizer.sparse.lr=0.05",
                    f"data.path={folder}/data",
                    f"trainer.run_dir={folder}/run",
                    f"embedding.rows={options.rows}",
                    f"trainer.threads={options.threads}",
                    "trainer.log_every=1000000",
                ],
                "",
            )
            return config, "cpu", 60.0

        return run(load, bench)


if __name__ == "__main__":
    restart_with_idle_threads_asleep()  # as training runs
    sys.exit(main())
