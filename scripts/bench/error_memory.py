"""What an error memory is worth on days that drift: AUC and logloss by hour, of the model as it is and corrected.

    python scripts/bench/error_memory.py                            # one model, trained on the first days, then frozen
    python scripts/bench/error_memory.py --drift 0                  # nothing drifts: nothing is to be gained
    python scripts/bench/error_memory.py --retrain                  # trained on each day behind it: the memory is reset

Rows are scored in order of time; a label is known `--delay` seconds after its row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tessera.ctr.config import load_config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.synthetic import SyntheticConfig, write_synthetic
from tessera.ctr.metrics.exact import auc, logloss
from tessera.ctr.models.hidden import hidden_of
from tessera.ctr.serving.error_memory import ErrorMemory, MemorySettings
from tessera.ctr.serving.in_time import corrected_in_time, rows_of
from tessera.ctr.train.evaluate import evaluate, open_reader
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process

COMMON = ["data=synthetic", "model.hidden=[64,64]", "model.embedding_dim=8", "embedding.rows=100000"]
COMMON += ["trainer.device=cpu", "trainer.threads=1", "trainer.batch_size=512", "embedding.init_std=0.0001"]
COMMON += ["data.train=.", "data.valid=null", "data.test=null", "trainer.log_every=1000000"]
COMMON += ["optimizer.sparse.name=rowwise_adagrad", "optimizer.sparse.lr=0.006", "optimizer.dense.lr=0.004"]
HOUR = 3600


class Model:
    """A model over days: it is trained on some, and scores others."""

    def __init__(self, options: argparse.Namespace, process: Process, folder: Path) -> None:
        config = SyntheticConfig(
            rows=options.rows * options.days, days=options.days, drift=options.drift, new_ids=options.new_ids
        )
        write_synthetic(config, folder / "data")
        self.days = sorted(path.name.removeprefix("day=") for path in (folder / "data").glob("day=*"))
        paths = [f"data.path={folder / 'data'}", f"trainer.run_dir={folder / 'run'}", f"model={options.model}"]
        self.config = load_config([*paths, *COMMON, f"trainer.seed={options.seed}"], "")
        self.config.data.days = self.days[:1]
        self.process, self.trainer = process, Trainer(self.config, process)

    def train(self, day: str) -> None:
        for batch in self._reader(day, training=True).epoch(0):
            self.trainer.engine.train_step(batch)

    def score(self, day: str) -> dict[str, torch.Tensor]:
        """Return time, label, prediction and hidden of a day's rows."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in ("time", "label", "prediction", "hidden")}
        network = self.trainer.engine.network

        def watch(batch: Batch, logits: torch.Tensor) -> None:
            assert batch.time is not None
            of = (batch.time, batch.labels[:, 0], torch.sigmoid(logits), hidden.take())
            for name, values in zip(found, of, strict=True):
                found[name].append(values[: batch.rows].clone())

        with hidden_of(network.tower) as hidden:
            evaluate(self.trainer.engine.model, self._reader(day), self.process, watch=watch)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _reader(self, day: str, *, training: bool = False) -> ParquetReader:
        path = f"{self.config.data.path}/{self.config.data.train}"
        return open_reader(self.config, self.trainer.engine.schema, self.process, path, training=training, days=[day])


def compare(options: argparse.Namespace, process: Process) -> None:
    settings = MemorySettings(options.arrays, options.bits, options.strength, options.gamma, options.temperature)
    with tempfile.TemporaryDirectory() as folder:
        model = Model(options, process, Path(folder))
        for day in model.days[: options.train_days]:
            model.train(day)
        memory: ErrorMemory | None = None
        rows, begin = [], None
        for day in model.days[options.train_days :]:
            scored = model.score(day)
            if memory is None or options.retrain:
                memory = ErrorMemory(scored["hidden"].shape[1], settings, day)
            times, base, label = (scored[name].numpy() for name in ("time", "prediction", "label"))
            read = rows_of(scored["hidden"], scored["prediction"], scored["label"])
            corrected = corrected_in_time(memory, times, read, delay_seconds=options.delay)
            begin = int(times.min()) // HOUR if begin is None else begin
            rows.append((times // HOUR - begin, label, base, corrected))
            if options.retrain:
                model.train(day)
        hours, label, base, corrected = (np.concatenate(column) for column in zip(*rows, strict=True))
        table(hours, label, base, corrected, options.hours)
        assert memory is not None
        print(f"memory: {memory.bytes / 1e6:.1f} MB, {memory.rows:,} rows")


def table(hours: np.ndarray, label: np.ndarray, base: np.ndarray, corrected: np.ndarray, at_once: int) -> None:
    of_metrics = " ".join(f"{name:>8} {'corrected':>10} {'gain':>9}" for name in ("AUC", "logloss"))
    print(f"{'hours':>9} {'rows':>8} {of_metrics}")

    def line(name: str, chosen: np.ndarray) -> None:
        found = [metric(one[chosen], label[chosen]) for metric in (auc, logloss) for one in (base, corrected)]
        a, b, c, d = (float("nan") if one is None else one for one in found)
        print(f"{name:>9} {chosen.sum():>8,} {a:8.5f} {b:10.5f} {b - a:+9.5f} {c:8.5f} {d:10.5f} {c - d:+9.5f}")

    for first in range(0, int(hours.max()) + 1, at_once):
        chosen = (hours >= first) & (hours < first + at_once)
        if chosen.any():
            line(f"{first}-{first + at_once - 1}", chosen)
    line("all", np.ones(len(label), bool))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000, help="of a day (default: %(default)s)")
    parser.add_argument("--days", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--train-days", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--drift", type=float, default=0.2, help="radians a day (default: %(default)s)")
    parser.add_argument("--new-ids", type=float, default=0.12, help="share a day (default: %(default)s)")
    parser.add_argument("--model", default="deepfm", help="default: %(default)s")
    parser.add_argument("--retrain", action="store_true", help="train on each day after it was scored")
    parser.add_argument("--delay", type=int, default=600, help="seconds until a label is known (default: %(default)s)")
    parser.add_argument("--hours", type=int, default=6, help="of a line of the table (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    for name, value in vars(MemorySettings()).items():
        if name != "seed":
            parser.add_argument(f"--{name}", type=type(value), default=value, help="default: %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    return run(lambda: (options, "cpu", 600.0), compare)


if __name__ == "__main__":
    sys.exit(main())
