"""What semantic ids are worth on the day after training, when half of the catalogue is new.

    python scripts/bench/semantic_ids.py                     # a table: AUC on new and on old items, and the ceiling
    python scripts/bench/semantic_ids.py --codes 16 --levels 2

Items lie in clusters of clusters, and what an item adds to the logit of a click is a function of its vector. A model is
trained on a day of old items, with codebooks made of their vectors. On the next day half of the items are new; they get
ids of the same codebooks. The ceiling is the AUC of the true probabilities.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tessera.ctr.config import load_config
from tessera.ctr.data.batch import Batch
from tessera.ctr.metrics.exact import auc
from tessera.ctr.semantic_ids.assign import write_semantic_ids
from tessera.ctr.semantic_ids.codebooks import Making
from tessera.ctr.semantic_ids.join import join_semantic_ids
from tessera.ctr.train.evaluate import evaluate, open_reader
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process

FEATURES = {
    "item": "{name: item}",
    "sid": "{name: sid, kind: ids, pooling: sum}",
    "place": "{name: place}",
}
#: What a model sees of an item.
MODELS = {"item id": ["item"], "prefixes": ["sid"], "both": ["item", "sid"]}
COMMON = ["data=synthetic", "data.schema.time=null", "data.valid=null", "data.test=null", "data.lanes=4"]
COMMON += ["model.hidden=[32]", "model.embedding_dim=8", "embedding.rows=20000", "embedding.init_std=0.001"]
COMMON += ["optimizer.sparse.name=rowwise_adagrad"]
COMMON += ["trainer.device=cpu", "trainer.threads=1", "trainer.log_every=1000000", "trainer.batch_size=512"]
SPLITS = ("train", "old", "new")


class Catalogue:
    """Vectors float32 [2 items, dim] of old and then new items, and the logit float64 [2 items] of a click on each."""

    def __init__(self, items: int, dim: int, signal: float, draw: np.random.Generator) -> None:
        x = np.zeros((2 * items, dim))
        for clusters, spread in ((12, 1.0), (144, 0.5)):
            x += spread * draw.normal(size=(clusters, dim))[draw.integers(0, clusters, 2 * items)]
        self.x = (x + 0.1 * draw.normal(size=x.shape)).astype(np.float32)
        waves = np.sin(self.x @ draw.normal(size=(dim, 8)) / np.sqrt(dim) * 2 + draw.uniform(0, 6, 8)).sum(1)
        self.logit = signal * (waves - waves.mean()) / waves.std() - 1

    def write(self, folder: Path, rows: int, draw: np.random.Generator) -> dict[str, float | None]:
        """Write vectors, a day of old items, and the old and the new half of the next; return the ceilings."""
        items, found = len(self.x) // 2, {}
        for name, first in (("old", 0), ("new", items)):
            (folder / "vectors" / name).mkdir(parents=True)
            here = np.arange(first, first + items)
            table = pa.table({"item": here, "vector": list(self.x[here])})
            pq.write_table(table, folder / "vectors" / name / "part.parquet")
        for name in SPLITS:
            count, first = (rows, 0) if name == "train" else (rows // 4, items if name == "new" else 0)
            item = first + draw.integers(0, items, count)
            p = 1 / (1 + np.exp(-self.logit[item]))
            label = (draw.random(count) < p).astype(np.int8)
            (folder / "log" / name).mkdir(parents=True)
            table = pa.table({"label": label, "item": item, "place": draw.integers(0, 8, count)})
            pq.write_table(table, folder / "log" / name / "part.parquet", row_group_size=4096)
            found[name] = auc(p, label)
        return found


def make_data(options: argparse.Namespace, seed: int, folder: Path) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Write the joined data below `folder`; return the report of the ids, and the ceilings."""
    draw = np.random.default_rng(seed)
    catalogue = Catalogue(options.items, options.dim, options.signal, draw)
    ceilings = catalogue.write(folder, options.rows, draw)
    making = Making(options.levels, options.codes)
    write_semantic_ids([str(folder / "vectors" / "old")], folder / "ids", making)
    report = write_semantic_ids([str(folder / "vectors" / "new")], folder / "ids_of_all", folder / "ids")
    join_semantic_ids(str(folder / "log"), folder / "ids_of_all", folder / "data", item="item")
    return report, ceilings


def scores(options: argparse.Namespace, process: Process, folder: Path, sees: Sequence[str], seed: int) -> list[float]:
    """Train a model on the first day; return its AUC on old and on new items of the second."""
    features = ", ".join(FEATURES[name] for name in [*sees, "place"])
    paths = [f"data.path={folder / 'data'}", f"trainer.run_dir={folder / '-'.join(sees)}", f"trainer.seed={seed}"]
    rates = [f"optimizer.sparse.lr={options.sparse_lr}", f"optimizer.dense.lr={options.dense_lr}"]
    config = load_config([*COMMON, *paths, *rates, f"data.schema.features=[{features}]"], "")
    trainer = Trainer(config, process)
    for epoch in range(options.epochs):
        for batch in trainer.readers.train.epoch(epoch):
            trainer.engine.train_step(batch)
    found = []
    for name in ("old", "new"):
        logits: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []

        def watch(batch: Batch, logit: torch.Tensor, *, to: tuple = (logits, labels)) -> None:
            to[0].append(logit[: batch.rows].reshape(-1).clone())
            to[1].append(batch.labels[: batch.rows, 0].clone())

        path = f"{config.data.path}/{name}"
        reader = open_reader(config, trainer.engine.schema, process, path, training=False)
        evaluate(trainer.engine.model, reader, process, watch=watch)
        found.append(auc(torch.sigmoid(torch.cat(logits)).numpy(), torch.cat(labels).numpy()) or 0.5)
    return found


def compare(options: argparse.Namespace, process: Process) -> None:
    found: dict[str, list[list[float]]] = {name: [] for name in [*MODELS, "ceiling"]}
    for seed in range(1, options.seeds + 1):
        with tempfile.TemporaryDirectory() as place:
            report, ceilings = make_data(options, seed, Path(place))
            found["ceiling"].append([ceilings["old"] or 0.5, ceilings["new"] or 0.5])
            for name, sees in MODELS.items():
                found[name].append(scores(options, process, Path(place), sees, seed))
        errors = ", ".join(f"{error:.3f}" for error in report["error"])
        prefixes = ", ".join(f"{count:,}" for count in report["prefixes"])
        print(f"seed {seed}: error of new items by level {errors}; prefixes {prefixes} of {report['items']:,} items")
    print(f"{'AUC':<10} {'old items':>19} {'new items':>19}")
    for name, rows in found.items():
        columns = [[row[column] for row in rows] for column in (0, 1)]
        shown = [f"{statistics.mean(one):.4f} ± {statistics.pstdev(one):.4f}" for one in columns]
        print(f"{name:<10} {shown[0]:>19} {shown[1]:>19}", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=3000, help="old ones, and as many new (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=120_000, help="of the first day (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=16, help="of the vectors (default: %(default)s)")
    parser.add_argument("--signal", type=float, default=1.2, help="deviation of the true logit (default: %(default)s)")
    parser.add_argument("--levels", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--codes", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--sparse-lr", type=float, default=0.05, help="default: %(default)s")
    parser.add_argument("--dense-lr", type=float, default=0.003, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    return run(lambda: (options, "cpu", 600.0), compare)


if __name__ == "__main__":
    sys.exit(main())
