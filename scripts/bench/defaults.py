"""How far the defaults are from the best settings of data sets of different shape.

    python -m tessera.scripts.bench.defaults [--data FOLDER] [--sets synthetic ...] [--settings lr-0.02 ...]
    python -m tessera.scripts.bench.defaults --table           # of what is there
    python -m tessera.scripts.bench.defaults --final NAME ...  # these and each set's best, on three seeds
    python -m tessera.scripts.bench.defaults --write OUTPUT    # the data sets, for peers/fuxictr.sh

Every setting is trained on every data set: DeepFM as it comes, the epoch that is best on the valid split by AUC minus
logloss, one seed. The loss of a setting on a set is how far its valid AUC and logloss are from the best of all settings
there; good defaults lose little everywhere. `--final` trains the chosen settings (defaults, and those of before) and
the best setting of each set on seeds of their own and prints all on the test split. FOLDER holds the small real logs
(criteo-sample, avazu-sample, ml-100k, ml-100k-random); without it only the synthetic sets are used. Results lie in
build/bench/defaults, a file each, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tessera.ctr.config import load_config
from tessera.ctr.data.convert.avazu import convert_avazu
from tessera.ctr.data.convert.criteo import convert_criteo
from tessera.ctr.data.convert.movielens import convert_movielens
from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.convert.pipeline import Input, Options
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.runs.saved_model import load_model
from tessera.ctr.train.evaluate import evaluate
from tessera.distributed import process as processes
from tessera.distributed.rank import Process
from tessera.scripts.bench.fits import Fits, Result, mean_and_spread, trained

METRICS = ("auc", "logloss")
SPLITS = ("valid", "test")
COMMON = [
    *("trainer.device=cpu", "trainer.threads=1", "trainer.log_every=1000000", "export.check=never"),
    *("trainer.early_stop.metric=auc-logloss", "model=deepfm", "embedding.rows=100000"),
]


class DataSet(NamedTuple):
    """How a set is made, what it is called in conf/data, and batch size and passes that suit its number of rows."""

    make: Callable[[Path, Path], object]  # of the folder of logs and that of the output
    name: str
    batch: int
    epochs: int
    patience: int
    needs: str | None = None  # folder of logs


def synthetic(**more: Any) -> Callable[[Path, Path], object]:
    config = SyntheticConfig(rows=200_000, valid=0.2, test=0.2, **more)
    return lambda logs, output: write_synthetic(config, output, Writing(4096))


def log(convert: Callable[..., object], folder: str) -> Callable[[Path, Path], object]:
    files = {"train": "train.csv", "valid": "dev.csv", "test": "test.csv"}

    def make(logs: Path, output: Path) -> object:
        return convert(Input({split: [logs / folder / name] for split, name in files.items()}), output, Options())

    return make


def by_time(logs: Path, output: Path) -> object:
    return convert_movielens(logs / "ml-100k", output, Options(), "time")


def at_random(logs: Path, output: Path) -> object:
    return shutil.copytree(logs / "ml-100k-random", output)


SETS = {
    "as Criteo": DataSet(synthetic(), "synthetic", 1024, 3, 1),
    "few ids, little noise": DataSet(synthetic(zipf=1.4, vocabulary=0.3, signal=3.0), "synthetic", 1024, 3, 1),
    "rare clicks, much noise": DataSet(synthetic(signal=0.7, base_rate=0.04), "synthetic", 1024, 3, 1),
    "long tail": DataSet(synthetic(zipf=0.8, vocabulary=10.0), "synthetic", 1024, 3, 1),
    "MovieLens by time": DataSet(by_time, "movielens", 1024, 20, 2, "ml-100k"),
    "MovieLens at random": DataSet(at_random, "ml100k", 1024, 20, 2, "ml-100k-random"),
    "Criteo's log, 10,000 rows": DataSet(log(convert_criteo, "criteo-sample"), "criteo", 256, 20, 2, "criteo-sample"),
    "Avazu's log, 10,000 rows": DataSet(log(convert_avazu, "avazu-sample"), "avazu", 256, 20, 2, "avazu-sample"),
}

ROWWISE, ADAM = "optimizer.sparse.name=rowwise_adagrad", "optimizer.sparse.name=adam"
LR = "optimizer.sparse.lr="
FIRST_SUM = "optimizer.sparse.initial_accumulator="
ADMITTED = ["embedding.admission.kind=exact", "embedding.oov=learned", "embedding.init=oov"]
SETTINGS: dict[str, list[str]] = {
    "rowwise 0.05": [ROWWISE, f"{LR}0.05"],
    "rowwise 0.02": [ROWWISE, f"{LR}0.02"],
    "rowwise 0.01": [ROWWISE, f"{LR}0.01"],
    "rowwise 0.1": [ROWWISE, f"{LR}0.1"],
    "adagrad 0.02": ["optimizer.sparse.name=adagrad", f"{LR}0.02"],
    "adagrad 0.01": ["optimizer.sparse.name=adagrad", f"{LR}0.01"],
    "adam 0.001": [ADAM, f"{LR}0.001"],
    "adam 0.002": [ADAM, f"{LR}0.002"],
    "adam 0.0005": [ADAM, f"{LR}0.0005"],
    "adam 0.0015": [ADAM, f"{LR}0.0015"],
    "adam 0.003": [ADAM, f"{LR}0.003"],
    "rowwise 0.05, first sum 0.3": [ROWWISE, f"{LR}0.05", FIRST_SUM + "{batch:0.3}"],
    "rowwise 0.05, first sum 0.1": [ROWWISE, f"{LR}0.05", FIRST_SUM + "{batch:0.1}"],
    "rowwise 0.1, first sum 1": [ROWWISE, f"{LR}0.1", FIRST_SUM + "{batch:1}"],
    "rowwise 0.02, first sum 0.1": [ROWWISE, f"{LR}0.02", FIRST_SUM + "{batch:0.1}"],
    "rowwise 0.02, dropout 0.2": [ROWWISE, f"{LR}0.02", "model.dropout=0.2"],
    "rowwise 0.02, batch norm": [ROWWISE, f"{LR}0.02", "model.batch_norm=true"],
    "rowwise 0.02, dense 0.0005": [ROWWISE, f"{LR}0.02", "optimizer.dense.lr=0.0005"],
    "rowwise 0.02, dense 0.002": [ROWWISE, f"{LR}0.02", "optimizer.dense.lr=0.002"],
    "rowwise 0.02, init 0.001": [ROWWISE, f"{LR}0.02", "embedding.init_std=0.001"],
    "rowwise 0.02, decay 0.05": [ROWWISE, f"{LR}0.02", "optimizer.sparse.decay=0.05"],
    "rowwise 0.02, decay 0.2": [ROWWISE, f"{LR}0.02", "optimizer.sparse.decay=0.2"],
    "rowwise 0.02, decay 0.2 by count": [
        *(ROWWISE, f"{LR}0.02", "optimizer.sparse.decay=0.2", "optimizer.sparse.decay_count_power=0.5"),
    ],
    "rowwise 0.02, seen 3 times": [ROWWISE, f"{LR}0.02", *ADMITTED, "embedding.admission.threshold=3"],
    "rowwise 0.02, seen 10 times": [ROWWISE, f"{LR}0.02", *ADMITTED, "embedding.admission.threshold=10"],
    "rowwise 0.02, l2 1e-5": [ROWWISE, f"{LR}0.02", "embedding.l2=0.00001"],
    "rowwise 0.02, adamw 0.01": [
        *(ROWWISE, f"{LR}0.02", "optimizer.dense.name=adamw", "optimizer.dense.weight_decay=0.01"),
    ],
    "rowwise 0.02, dropout 0.2, decay 0.05": [
        *(ROWWISE, f"{LR}0.02", "model.dropout=0.2", "optimizer.sparse.decay=0.05"),
    ],
    "adam 0.002, dropout 0.2": [ADAM, f"{LR}0.002", "model.dropout=0.2"],
    "adam 0.002, decay 1": [ADAM, f"{LR}0.002", "optimizer.sparse.decay=1.0"],
    "adam 0.0015, dropout 0.2": [ADAM, f"{LR}0.0015", "model.dropout=0.2"],
    "adam 0.0015, decay 1": [ADAM, f"{LR}0.0015", "optimizer.sparse.decay=1.0"],
    "adam 0.0015, dense 0.0005": [ADAM, f"{LR}0.0015", "optimizer.dense.lr=0.0005"],
    "adam 0.0015, batch norm": [ADAM, f"{LR}0.0015", "model.batch_norm=true"],
    "adam 0.0015, seen 3 times": [ADAM, f"{LR}0.0015", *ADMITTED, "embedding.admission.threshold=3"],
    "adam 0.001, dropout 0.2": [ADAM, f"{LR}0.001", "model.dropout=0.2"],
    "adam 0.001, dropout 0.2, decay 1": [ADAM, f"{LR}0.001", "model.dropout=0.2", "optimizer.sparse.decay=1.0"],
}


class Batch(int):
    """A batch size. `{batch:0.1}` in an override is (0.1 / batch size)^2: gradients are of the mean over a batch, so
    that is the first sum of squares that counts as a gradient of 0.1 from a single row."""

    def __format__(self, gradient: str) -> str:
        return repr((float(gradient) / self) ** 2)


class Experiment:
    """Fits of settings on data sets, which are written when a fit needs them."""

    def __init__(self, fits: Fits, logs: Path | None, scratch: Path, process: Process) -> None:
        self.fits, self.logs, self.scratch, self.process = fits, logs, scratch, process

    def fit(self, data_set: str, setting: str, seed: int) -> Result | None:
        """Return {split: {metric: value}}; None if it is not there and nothing may be trained."""
        of_set = SETS[data_set]
        own = [*(one.format(batch=Batch(of_set.batch)) for one in SETTINGS[setting]), f"trainer.seed={seed}"]
        made_of = {"overrides": own, "batch": of_set.batch, "epochs": of_set.epochs, "patience": of_set.patience}
        if not self.fits.read_only and of_set.needs and (self.logs is None or not (self.logs / of_set.needs).is_dir()):
            return None
        name = f"{data_set}/{setting}-{seed}".replace(" ", "_").replace(",", "")
        return self.fits.once(name, made_of, partial(self._fitted, data_set, own))

    def _fitted(self, data_set: str, own: Sequence[str]) -> Result:
        of_set, folder = SETS[data_set], self.scratch / file_name(data_set)
        if not folder.exists():
            of_set.make(self.logs or Path(), folder)
        with tempfile.TemporaryDirectory(dir=self.scratch) as run_dir:
            of_run = [f"data={of_set.name}", f"data.path={folder}", f"trainer.run_dir={run_dir}/run"]
            of_run += [f"trainer.batch_size={of_set.batch}", f"trainer.epochs={of_set.epochs}"]
            of_run += [f"trainer.early_stop.patience={of_set.patience}"]
            trainer = trained([*COMMON, *of_run, *own], self.process)
            load_model(trainer.engine.model, Path(run_dir) / "run/best", self.process)
            result: Result = {"epochs": trainer.progress.epoch}
            for split in SPLITS:
                reader = trainer.readers[split]
                assert reader is not None
                found = evaluate(trainer.engine.model, reader, self.process)
                result[split] = {metric: found[metric] for metric in METRICS}
        return result


def write_sets(names: Sequence[str], logs: Path | None, output: Path) -> None:
    """Write data sets, and in `set.json` of each the kinds of its features, its splits and its batch size."""
    for name in names:
        of_set, folder = SETS[name], output / file_name(name)
        if (folder / "set.json").exists() or (of_set.needs and (logs is None or not (logs / of_set.needs).is_dir())):
            continue
        of_set.make(logs or Path(), folder)
        data = load_config([f"data={of_set.name}", f"data.path={folder}"], "").data
        kinds = {one.name: one.kind for one in data.schema.features}
        described = {"features": kinds, "splits": {split: getattr(data, split) for split in ("train", *SPLITS)}}
        (folder / "set.json").write_text(json.dumps(described | {"batch": of_set.batch}, indent=1) + "\n")


def file_name(name: str) -> str:
    return name.replace(" ", "_").replace(",", "").replace("'", "")


def losses(results: dict[str, Result]) -> dict[str, tuple[float, float]]:
    """Return of each setting how far its valid AUC and logloss are from the best of all settings of this set."""
    auc = max(one["valid"]["auc"] for one in results.values())
    logloss = min(one["valid"]["logloss"] for one in results.values())
    return {name: (auc - one["valid"]["auc"], one["valid"]["logloss"] - logloss) for name, one in results.items()}


def best_of(results: dict[str, Result]) -> str:
    """Return the setting that has the highest AUC minus logloss on the valid split."""
    return max(results, key=lambda name: results[name]["valid"]["auc"] - results[name]["valid"]["logloss"])


def table(found: dict[str, dict[str, Result]], settings: Sequence[str]) -> str:
    """Return what settings lose on each set, AUC / logloss in thousandths, those with the smallest worst loss first."""
    lost = {data_set: losses(results) for data_set, results in found.items() if results}
    shared = [name for name in settings if all(name in one for one in lost.values())]
    # An AUC of 0.002 counts as much as a logloss of 0.005.
    worst = {name: max(max(one[name][0] / 0.002, one[name][1] / 0.005) for one in lost.values()) for name in shared}
    lines = [f"| | worst | {' | '.join(lost)} |", "|---" * (len(lost) + 2) + "|"]
    for name in sorted(shared, key=worst.__getitem__):
        cells = [f"{1e3 * one[name][0]:.1f} / {1e3 * one[name][1]:.1f}" for one in lost.values()]
        lines.append(f"| {name} | {worst[name]:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def final(
    experiment: Experiment, found: dict[str, dict[str, Result]], chosen: Sequence[str], seeds: Sequence[int]
) -> str:
    """Return chosen settings beside the best one of each set: mean and deviation over seeds, on the test split."""
    heads = [f"{name}: AUC | logloss" for name in (*chosen, "tuned")]
    lines = [f"| | {' | '.join(heads)} | by |", "|---" * (2 * len(heads) + 2) + "|"]
    for data_set, results in found.items():
        cells = []
        best = best_of(results)
        for name in (*chosen, best):
            runs = [run for seed in seeds if (run := experiment.fit(data_set, name, seed)) is not None]
            cells += [mean_and_spread([run["test"][metric] for run in runs]) for metric in METRICS if runs]
        lines.append(f"| {data_set} | {' | '.join(cells)} | {best} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the small real logs")
    parser.add_argument("--output", type=Path, default=Path("build/bench/defaults"), help="folder of the results")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), metavar="SET")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--seed", type=int, default=0, help="of the models whose settings are compared")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of --final")
    parser.add_argument("--final", nargs="+", choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    parser.add_argument("--write", type=Path, metavar="OUTPUT", help="write the data sets there and train nothing")
    options = parser.parse_args()
    if options.write:
        write_sets(options.sets, options.data, options.write)
        return 0
    process = processes.start("cpu", 300.0)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            fits = Fits(options.output, read_only=options.table)
            experiment = Experiment(fits, options.data, Path(scratch), process)
            found: dict[str, dict[str, Result]] = {data_set: {} for data_set in options.sets}
            for setting in options.settings:
                for data_set, results in found.items():
                    result = experiment.fit(data_set, setting, options.seed)
                    if result is not None:
                        results[setting] = result
            found = {data_set: results for data_set, results in found.items() if results}
            print(table(found, options.settings))
            if options.final:
                print(final(experiment, found, options.final, options.seeds))
    finally:
        processes.stop(process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
