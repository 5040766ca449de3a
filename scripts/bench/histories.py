"""What a history is worth, pooled and seen event by event: AUC and logloss, mean over seeds.

    python -m tessera.scripts.bench.histories synthetic                          # beside the ceiling of teacher.json
    python -m tessera.scripts.bench.histories movielens --input FOLDER           # GroupLens or RecBole files, by time
    python -m tessera.scripts.bench.histories movielens --input FOLDER --table   # of what is there
    python -m tessera.scripts.bench.histories speed --length 200 --threads 2     # rows/s, and the share of the tower

Each of the first two takes less than 15 minutes on one core. Results lie in build/bench/histories, and what is there is
not done again. The settings of each model are those of `GRID` that are best on valid, with a seed of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from tessera.ctr import api
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.convert.histories import HistoryRule
from tessera.ctr.data.convert.movielens import convert_movielens
from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.convert.pipeline import Options, schema_from_conf
from tessera.ctr.data.synthetic_histories import HistoriesConfig, write_histories
from tessera.ctr.network import Network
from tessera.ctr.runs.saved_model import load_model
from tessera.ctr.train.engine import set_threads
from tessera.ctr.train.evaluate import evaluate
from tessera.ctr.train.trainer import Trainer
from tessera.distributed import process as processes
from tessera.distributed.rank import Process
from tessera.distributed.threads import restart_with_idle_threads_asleep
from tessera.scripts.bench.fits import Fits, Result, Setting, in_words, mean_and_spread, trained

COMMON = [
    "optimizer.sparse.name=rowwise_adagrad",
    *("trainer.device=cpu", "trainer.threads=1", "embedding.rows=100000", "trainer.log_every=1000000"),
    "model.embedding_dim=8",
]
MODELS = {
    "deepfm": ["model=deepfm", "model.hidden=[64,64]"],
    "pooled": ["model=deepfm", "model.hidden=[64,64]"],
    "din": ["model=din", "model.hidden=[64,64]", "model.attention_hidden=[32]"],
    "dare": ["model=dare", "model.hidden=[64,64]", "model.attention_dim=8"],
    "hstu": ["model=hstu", "model.width=32", "model.layers=1", "model.heads=1", "model.preprocessor=32"]
    + ["model.qk_dim=32", "model.v_dim=32", "model.head_hidden=32"],
}
WIDE = "hstu-wide"  # of `speed`: two layers of width 64
SPEED_MODELS = MODELS | {
    WIDE: [*MODELS["hstu"], "model.width=64", "model.layers=2", "model.qk_dim=64", "model.v_dim=64"]
}
DROPOUT = {"hstu": "model.input_dropout"}  # of the others: model.dropout
GRID = {
    "synthetic": {"optimizer.sparse.lr": (0.02, 0.05), "optimizer.dense.lr": (0.001, 0.003), "dropout": (0.0,)},
    "movielens": {"optimizer.sparse.lr": (0.02, 0.05), "optimizer.dense.lr": (0.001, 0.003), "dropout": (0.3,)},
}
EPOCHS = {"synthetic": 2, "movielens": 4}
LENGTH = {"synthetic": 50, "movielens": 20, "speed": 50}
BATCH = SPEED_ROWS = 256
SPEED_STEPS = 12
SHOWN = list(itertools.product(("valid", "test"), ("auc", "logloss")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("synthetic", "movielens", "speed"))
    parser.add_argument("--input", type=Path, help="folder of MovieLens' files")
    parser.add_argument("--output", type=Path, default=Path("build/bench/histories"), help="folder of the results")
    parser.add_argument("--models", nargs="+", choices=list(SPEED_MODELS), help=f"{WIDE}: of speed alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the models")
    parser.add_argument("--tune-seed", type=int, default=0, help="of the models whose settings are compared")
    parser.add_argument("--rows", type=int, default=100_000, help="of the synthetic data")
    parser.add_argument("--length", type=int, help="of histories; without it 50, of MovieLens 20")
    parser.add_argument("--threads", type=int, default=1, help="of speed; beyond 1 the clock's time is taken")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    options = parser.parse_args()
    options.length = options.length or LENGTH[options.data]
    options.models = options.models or list(SPEED_MODELS if options.data == "speed" else MODELS)
    if options.data == "speed":
        restart_with_idle_threads_asleep()  # as training runs
    elif WIDE in options.models:
        parser.error(f"{WIDE} is a model of speed alone")
    process = processes.start("cpu", 300.0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.data == "speed":
                speed(options, Path(folder), process)
            else:
                compare(options, Path(folder), process)
    finally:
        processes.stop(process)
    return 0


def compare(options: argparse.Namespace, folder: Path, process: Process) -> None:
    """Train what is missing, all models of a seed before the next seed, and print the table after each seed."""
    experiment = Experiment(options, folder, process)
    for last in range(len(options.seeds) if options.table else 1, len(options.seeds) + 1):
        lines = [f"| | {' | '.join(map(' '.join, SHOWN))} | seeds | chosen |", "|---" * (len(SHOWN) + 3) + "|"]
        rows = [(model, *experiment.of_model(model, options.seeds[:last])) for model in options.models]
        if options.data == "synthetic":
            ceilings = experiment.fits.once(
                "ceilings", {"rows": options.rows, "length": options.length}, experiment.best
            )
            rows.append(("best possible", {}, [ceilings] if ceilings else []))
        for name, chosen, runs in rows:
            if runs:
                cells = [mean_and_spread([run[split][metric] for run in runs]) for split, metric in SHOWN]
                lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} | {in_words(chosen)} |")
        print("\n".join(lines), flush=True)


class Experiment:
    """Fits of all models on one data set, which is written when a fit needs it."""

    def __init__(self, options: argparse.Namespace, folder: Path, process: Process) -> None:
        self.options, self.folder, self.process = options, folder, process
        self.fits = Fits(options.output / options.data, read_only=options.table)

    @cached_property
    def features(self) -> list[dict[str, Any]]:
        """The data's features; they are written with it."""
        return make_data(self.options, self.folder / "data")

    def best(self) -> Result:
        """Return AUC and logloss that no model can surpass, by split."""
        assert self.features
        splits = json.loads((self.folder / "data/teacher.json").read_text())["splits"]
        return {split: {metric: splits[split][metric] for _, metric in SHOWN[:2]} for split in ("valid", "test")}

    def of_model(self, model: str, seeds: Sequence[int]) -> tuple[Setting | None, list[Result]]:
        """Return the best setting of a model and the results of the seeds that are there."""
        data = self.options.data
        tune = partial(self.fit, model, self.options.tune_seed)
        setting = self.fits.best_setting(model, GRID[data], lambda name, one: tune(name, one))
        if setting is None:
            return None, []
        found = [self.fit(model, seed, f"seed-{seed}/{model}", setting) for seed in seeds]
        return setting, [one for one in found if one is not None]

    def fit(self, model: str, seed: int, name: str, setting: Setting) -> Result | None:
        """Return AUC and logloss of a model by split; `watched` is that by which settings are chosen."""
        own = [*MODELS[model], *overrides_of(model, setting), f"trainer.seed={seed}"]
        options = self.options
        made_of = {"overrides": own, "rows": options.rows, "length": options.length, "epochs": EPOCHS[options.data]}
        return self.fits.once(name, made_of, partial(self._fitted, model, own))

    def _fitted(self, model: str, own: list[str]) -> Result:
        data = self.options.data
        with tempfile.TemporaryDirectory(dir=self.folder) as run_dir:
            fixed = [f"trainer.epochs={EPOCHS[data]}", f"trainer.batch_size={BATCH}", f"trainer.run_dir={run_dir}/run"]
            fixed += ["trainer.early_stop.metric=auc", "trainer.early_stop.patience=1"]
            of_data = data_of(data, self.folder / "data", self.features, model)
            trainer = trained([*COMMON, *fixed, *of_data, *own], self.process)
            load_model(trainer.engine.model, Path(run_dir) / "run/best", self.process)
            result: Result = {"watched": trainer.progress.best}
            for split in ("valid", "test"):
                reader = trainer.readers[split]
                assert reader is not None
                found = evaluate(trainer.engine.model, reader, self.process)
                result[split] = {metric: found[metric] for _, metric in SHOWN[:2]}
        return result


def overrides_of(model: str, setting: Setting) -> list[str]:
    """Return the overrides of a point of the grid."""
    names = {"dropout": DROPOUT.get(model, "model.dropout")}
    return [f"{names.get(key, key)}={value}" for key, value in setting.items()]


def make_data(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Write the data set; return its features."""
    if options.data == "movielens":
        rule = HistoryRule("user_id", ("item_id", "genre", "rating", "timestamp"), options.length, "timestamp")
        convert_movielens(options.input, folder, Options(), "time", 0.1, 0.1, history=rule)
        own = schema_from_conf("movielens")["features"]
    else:
        write_histories(HistoriesConfig(options.rows, length=options.length), folder, Writing(4096))
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


def speed(options: argparse.Namespace, folder: Path, process: Process) -> None:
    """Print rows per second in training steps, the tower's share of their time, and what the tower keeps of a batch for
    its backward pass. With one thread it is the processor's time, which does not depend on what else runs; with more
    the clock's, of the fastest step: nothing else should run."""
    options.data, options.rows = "synthetic", 4000
    features = make_data(options, folder / "data")
    clock, of_all = (time.process_time, statistics.median) if options.threads == 1 else (time.perf_counter, min)
    for model in options.models:
        overrides = [*SPEED_MODELS[model], *data_of("synthetic", folder / "data", features, model)]
        fixed = [f"trainer.batch_size={SPEED_ROWS}", "data.test=null", "data.valid=null"]
        fixed += [f"trainer.threads={options.threads}", f"trainer.run_dir={folder / model}"]
        config = api.load_config(*COMMON, *overrides, *fixed)
        set_threads(config)
        trainer = Trainer(config, process)
        reader = trainer.readers["train"]
        assert reader is not None
        batches = list(itertools.islice(reader.epoch(0), SPEED_STEPS))
        whole = seconds([partial(trainer.engine.train_step, batch) for batch in batches], clock, of_all)
        network = trainer.engine.model.module
        inputs = [(batch, looked_up(network, batch)) for batch in batches]
        alone = seconds([partial(tower_step, network, *one) for one in inputs], clock, of_all)
        kept = bytes_kept(partial(tower_step, network, *inputs[-1]))
        rate, share = SPEED_ROWS / whole, alone / whole
        events = sum(int(one.lengths().sum()) for batch in batches for one in histories_of(batch)) / len(batches)
        print(
            f"{model:9} {rate:8,.0f} rows/s, {events / whole:10,.0f} events/s, tower {share:4.0%}, keeps "
            f"{kept / SPEED_ROWS / 1024:,.1f} KiB a row, {kept / 2**20:,.1f} MiB a batch"
        )
        trainer.log.close()


def histories_of(batch: Batch) -> list[JaggedTensor]:
    """Return the sequence of items of a batch, if it has one."""
    return [batch.ids[name] for name in batch.ids.keys() if name == "history_item_id"]  # noqa: SIM118


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


def seconds(
    calls: list[Callable[[], Any]], clock: Callable[[], float], of_all: Callable[[list[float]], float]
) -> float:
    """Return the median or the least time of calls, without the first two."""
    times = []
    for call in calls:
        begin = clock()
        call()
        times.append(clock() - begin)
    return of_all(times[2:])


if __name__ == "__main__":
    sys.exit(main())
