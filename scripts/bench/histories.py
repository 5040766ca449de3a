"""What a history is worth, pooled and seen event by event: AUC and logloss, mean over seeds.

    python scripts/bench/histories.py synthetic                              # beside the ceiling of teacher.json
    python scripts/bench/histories.py movielens --input FOLDER               # GroupLens or RecBole files, by time
    python scripts/bench/histories.py movielens --input FOLDER --tune        # valid alone, of each setting in the grid
    python scripts/bench/histories.py speed --length 200                     # rows/s, and the share of the tower

Settings are chosen on valid by --tune, with one seed; `CHOSEN` holds them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tessera.ctr import api
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.convert.histories import HistoryRule
from tessera.ctr.data.convert.movielens import convert_movielens
from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.convert.pipeline import Options, schema_from_conf
from tessera.ctr.data.synthetic_histories import HistoriesConfig, write_histories
from tessera.ctr.network import Network
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.rank import Process

COMMON = [
    "trainer.device=cpu",
    "trainer.threads=1",
    "embedding.rows=100000",
    "trainer.log_every=1000000",
    "model.embedding_dim=8",
]
COMMON += ["trainer.early_stop.metric=auc", "trainer.early_stop.patience=2"]
MODELS = {
    "deepfm": ["model=deepfm", "model.hidden=[64,64]"],
    "pooled": ["model=deepfm", "model.hidden=[64,64]"],
    "din": ["model=din", "model.hidden=[64,64]", "model.attention_hidden=[32]"],
    "dare": ["model=dare", "model.hidden=[64,64]", "model.attention_dim=8"],
    "hstu": ["model=hstu", "model.width=32", "model.layers=1", "model.heads=1", "model.preprocessor=32"]
    + ["model.qk_dim=32", "model.v_dim=32", "model.head_hidden=32"],
}
DROPOUT = {"hstu": "model.input_dropout"}  # of the others: model.dropout
GRID = {"lr": (0.02, 0.05), "dropout": (0.3,)}
CHOSEN: dict[str, dict[str, dict[str, float]]] = {
    "synthetic": {name: {"lr": 0.05, "dropout": 0.0} for name in MODELS},
    "movielens": {name: {"lr": 0.05, "dropout": 0.3} for name in MODELS},
}
EPOCHS = {"synthetic": 2, "movielens": 4}
SPEED_ROWS = 256
BATCH = {"synthetic": 256, "movielens": 256}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("synthetic", "movielens", "speed"))
    parser.add_argument("--input", type=Path, help="folder of MovieLens' files")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=100_000, help="of the synthetic data")
    parser.add_argument("--length", type=int, default=50, help="of histories")
    parser.add_argument("--tune", action="store_true", help="show valid for each setting of the grid, with one seed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data == "speed":
            speed(options, Path(folder))
        else:
            compare(options, Path(folder))
    return 0


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Train all models and print a line for each."""
    features = make_data(options, folder / "data")
    for model in options.models:
        overrides = [*MODELS[model], *data_of(options.data, folder / "data", features, model)]
        if options.tune:
            for lr, dropout in itertools.product(*GRID.values()):
                report = trained([*overrides, *setting(model, lr, dropout)], options.data, 1, folder / "run")
                valid = report["splits"]["valid"]
                print(
                    f"{model:8} lr {lr} dropout {dropout}: valid {valid['auc']:.4f} {valid['logloss']:.4f}", flush=True
                )
            continue
        chosen = setting(model, **CHOSEN[options.data][model])
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        runs = [trained([*overrides, *chosen], options.data, seed, folder / "run") for seed in seeds]
        shown = []
        for split, metric in itertools.product(("valid", "test"), ("auc", "logloss")):
            values = [run["splits"][split][metric] for run in runs]
            shown.append(f"{split} {metric} {statistics.mean(values):.4f} ± {max(values) - min(values):.4f}")
        print(f"{model:8} {', '.join(shown)}", flush=True)


def make_data(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Write the data set; return its features. Of the synthetic one the ceiling is printed."""
    if options.data == "movielens":
        rule = HistoryRule("user_id", ("item_id", "genre", "rating", "timestamp"), options.length, "timestamp")
        convert_movielens(options.input, folder, Options(), "time", 0.1, 0.1, history=rule)
        own = schema_from_conf("movielens")["features"]
    else:
        result = write_histories(HistoriesConfig(options.rows, length=options.length), folder, Writing(4096))
        for split in ("valid", "test"):
            of = result["splits"][split]
            print(f"ceiling  {split} auc {of['auc']:.4f}, logloss {of['logloss']:.4f}", flush=True)
        own = [one for one in schema_from_conf("synthetic_histories")["features"] if one.get("kind") != "sequence"]
    return own + histories(options.data, options.length)


def histories(data: str, length: int) -> list[dict[str, Any]]:
    """Return the features of the histories, for models that see events."""
    group = {"kind": "sequence", "pooling": "none", "align": "history", "max_length": length}
    ago = group | {"name": "history_seconds_ago", "dtype": "float", "transform": "bucketise"}
    item = {"name": "history_item_id", "table": "item_id"} | group
    if data == "movielens":
        genre = {"name": "history_genre", "table": "genre", "dtype": "string"} | group
        # MovieLens' times are those at which a list was filled in: seconds, minutes, days ago tell sessions apart.
        ago |= {"boundaries": [60, 600, 3600, 86400, 604800]}
        return [item, genre, {"name": "history_rating", "dtype": "float"} | group, ago]
    category = {"name": "history_category", "table": "category"} | group
    return [item, category, ago | {"boundaries": [61, 121, 181, 241, 301, 601, 1201, 1801, 2401]}]


def data_of(data: str, folder: Path, features: list[dict[str, Any]], model: str) -> list[str]:
    """Return the overrides that name the data, with the histories as the model takes them."""
    if model == "deepfm":
        features = [one for one in features if one.get("kind") != "sequence"]
    if model == "pooled":
        kept = [one for one in features if one.get("dtype") != "float" or "boundaries" in one]
        features = [pooled(one) if one.get("kind") == "sequence" else one for one in kept]
    name = "synthetic_histories" if data == "synthetic" else "movielens"
    return [f"data={name}", f"data.path={folder}", f"data.schema.features={json.dumps(features).replace(chr(34), '')}"]


def pooled(feature: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in feature.items() if key != "align"} | {"pooling": "mean"}


def setting(model: str, lr: float, dropout: float) -> list[str]:
    """Return the overrides of a point of the grid."""
    return [f"optimizer.sparse.lr={lr}", f"{DROPOUT.get(model, 'model.dropout')}={dropout}"]


def trained(overrides: list[str], data: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train once; return the content of report.json."""
    own = [f"trainer.seed={seed}", f"trainer.epochs={EPOCHS[data]}", f"trainer.batch_size={BATCH[data]}"]
    run_dir = Path(tempfile.mkdtemp(dir=folder.parent))
    return api.train(api.load_config(*COMMON, *own, *overrides, f"trainer.run_dir={run_dir}")).report


def speed(options: argparse.Namespace, folder: Path) -> None:
    """Print rows per second of one core's time in training steps, the tower's share of it, and what the tower keeps of
    a batch for its backward pass. The processor's time and not the clock's: it does not depend on what else runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    process = Process(0, 0, 1, torch.device("cpu"), dist.HashStore())
    options.data, options.rows = "synthetic", 4000
    features = make_data(options, folder / "data")
    for model in options.models:
        overrides = [*MODELS[model], *data_of("synthetic", folder / "data", features, model)]
        fixed = [f"trainer.batch_size={SPEED_ROWS}", "data.test=null", "data.valid=null", "trainer.threads=1"]
        config = api.load_config(*COMMON[:-2], *fixed, *overrides, f"trainer.run_dir={folder / model}")
        trainer = Trainer(config, process)
        reader = trainer.readers["train"]
        assert reader is not None
        batches = list(itertools.islice(reader.epoch(0), 7))
        whole = seconds([partial(trainer.engine.train_step, batch) for batch in batches])
        network = trainer.engine.model.module
        inputs = [(batch, looked_up(network, batch)) for batch in batches]
        alone = seconds([partial(tower_step, network, *one) for one in inputs])
        kept = bytes_kept(partial(tower_step, network, *inputs[-1]))
        rate, share = SPEED_ROWS / whole, alone / whole
        print(f"{model:8} {rate:8,.0f} rows/s, tower {share:4.0%}, keeps {kept / SPEED_ROWS / 1024:,.1f} KiB a row")
        trainer.log.close()


def looked_up(network: Network, batch: Batch) -> dict[str, torch.Tensor]:
    """Return what the tower reads of a batch, cut off from the tables."""
    with torch.no_grad():
        found = network.eval().tables(batch.ids)
    network.train()
    return {name: rows.detach().requires_grad_() for name, rows in found.items()}


def tower_step(network: Network, batch: Batch, embeddings: dict[str, torch.Tensor]) -> None:
    """Run the tower forward and backward."""
    network.of_tower(batch, embeddings).sum().backward()


def bytes_kept(step: Callable[[], None]) -> int:
    """Return the bytes of all memory that a step keeps for its backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(kept.values())


def seconds(calls: list[Callable[[], Any]]) -> float:
    """Return the median of the processor's time of calls, without the first two."""
    times = []
    for call in calls:
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return statistics.median(times[2:])


if __name__ == "__main__":
    sys.exit(main())
