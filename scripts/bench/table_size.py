"""Measure a training step of DeepFM when its tables grow: 0.3 M, 3 M and 30 M rows.

    python scripts/bench/table_size.py --millions 0.3 3 30 --peer ENVIRONMENT

Criteo-shaped (13 numeric and 26 id fields, batch 4096, dim 16, MLP 400x3), one process. The tables grow by training on
batches of new ids. Then steps are timed whose ids are drawn from all rows: skewed (P(row k) ~ 1/k, as logs are) or all
rows alike, which no log is, so that nothing stays in the processor's cache. --peer: deepctr-torch with as many rows,
in the environment of scripts/bench/peers/deepctr_torch.sh; its Adam moves every row in every step. About 150 bytes a
row, for the peer 270 and as many again while it is built.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tessera.ctr.config import Config, load_config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process
from tessera.distributed.threads import restart_with_idle_threads_asleep
from tessera.scripts.bench.deepctr_torch import Peer
from tessera.scripts.bench.timing import alternate

BATCH, FIELDS, PRIME = 4096, 26, 2_654_435_761
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--millions", type=float, nargs="+", default=[0.3, 3, 30], help="rows of all tables together")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--steps", type=int, default=4, help="steps per round")
parser.add_argument("--peer", type=Path, help="environment of deepctr-torch")
parser.add_argument("--peer-millions", type=float, default=10, help="most rows that the peer is given")
options = parser.parse_args()


def batch_of(batch: Batch, rows_fb: torch.Tensor) -> Batch:
    """The batch with other ids: int64 [fields, batch] numbers of rows, scattered over 63 bits."""
    ids = (rows_fb * PRIME * PRIME) & (2**63 - 1)
    lengths = torch.ones(ids.numel(), dtype=torch.int32)
    return replace(batch, ids=KeyedJaggedTensor(batch.ids.keys(), ids.reshape(-1), lengths=lengths, stride=BATCH))


def grow(trainer: Trainer, batch: Batch, first: int, stop: int) -> int:
    """Trains on new ids until every table has `stop` rows or some more; returns how many it has."""
    while first < stop:
        trainer.engine.train_step(batch_of(batch, torch.arange(first, first + BATCH).expand(FIELDS, BATCH)))
        first += BATCH
    return first


def steps(trainer: Trainer, batch: Batch, rows: int, *, skewed: bool) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(rows)
    batches = []
    for _ in range(16):
        draws = torch.rand(FIELDS, BATCH, generator=generator, dtype=torch.float64)
        picked = (rows + 1.0) ** draws - 1 if skewed else draws * rows
        batches.append(batch_of(batch, picked.long().clamp(max=rows - 1)))
    turn = iter(range(1 << 30))
    return lambda: trainer.engine.train_step(batches[next(turn) % len(batches)])


def bench(config: Config, process: Process) -> None:
    trainer = Trainer(config, process)
    batch = next(batch for batch in trainer.readers.train.epoch(0) if batch.rows == BATCH)
    names = ("skewed ids", "all rows alike") + (("deepctr-torch",) if options.peer else ())
    print(f"{'rows':>12}" + "".join(f"{name + ', ms':>20}" for name in names), flush=True)
    rows = 0
    for millions in sorted(options.millions):
        rows = grow(trainer, batch, rows, int(millions * 1e6) // FIELDS)
        works = {name: steps(trainer, batch, rows, skewed=name == "skewed ids") for name in names[:2]}
        if options.peer and millions <= options.peer_millions:
            with Peer(options.peer, "DeepFM", rows * FIELDS, options.threads) as peer:
                medians = alternate(works | {"deepctr-torch": peer.step}, options.rounds, options.steps)
        else:
            medians = alternate(works, options.rounds, options.steps)
        cells = [f"{medians[name] * 1e3:.1f}" if name in medians else "not run" for name in names]
        print(f"{rows * FIELDS:>12,}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    trainer.log.close()


def load(folder: str) -> Config:
    fixed = ["data=synthetic", f"data.path={folder}/data", f"trainer.run_dir={folder}/run", "model=deepfm"]
    plus = ["trainer.log_every=1000000", f"trainer.batch_size={BATCH}", f"trainer.threads={options.threads}"]
    plus += ["optimizer.sparse.name=rowwise_adagrad", "optimizer.sparse.lr=0.05"]
    return load_config([*fixed, *plus], "")


if __name__ == "__main__":
    restart_with_idle_threads_asleep()  # as training runs
    with tempfile.TemporaryDirectory() as scratch:
        write_synthetic(SyntheticConfig(rows=20_000), Path(scratch) / "data")
        sys.exit(run(lambda: (load(scratch), "cpu", 60.0), bench))
