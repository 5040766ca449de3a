"""Compare ways to keep a model fresh, by the day (IncCTR, arXiv 2009.02147) or by the hour (Monolith, section 3.3).

    python scripts/bench/daily_methods.py synthetic
    python scripts/bench/daily_methods.py movielens --input FOLDER          # GroupLens or RecBole files; days are weeks
    python scripts/bench/daily_methods.py synthetic --online

Every day is scored by the model of the day before (progressive validation), then trained on. The mean over the days
after `--tune-days` is printed; rates are to be chosen with `--tune`, which reports only the days before.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tessera.ctr.config import load_config
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.reservoir import add_to_reservoir
from tessera.ctr.distil.teacher_logits import read_logits, score_teacher
from tessera.ctr.metrics.exact import auc, logloss
from tessera.ctr.runs.saved_model import save_model
from tessera.ctr.train.evaluate import evaluate, open_reader
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.process import run
from tessera.distributed.rank import Process
from tessera.scripts.bench.daily_data import Days, make_days

ROOT = Path(__file__).resolve().parents[2]

WINDOW = 7
COMMON = ["model.hidden=[64,64]", "model.embedding_dim=8", "embedding.rows=100000", "trainer.device=cpu"]
COMMON += ["data.train=.", "data.valid=null", "data.test=null", "trainer.log_every=1000000"]
#: data set -> its overrides, and the column by which rows are new
DATA = {
    "synthetic": (["data=synthetic", "trainer.batch_size=512", "embedding.init_std=0.0001"], "C10"),
    "movielens": (["data=movielens", "trainer.batch_size=256", "model.dropout=0.2"], "user_id"),
}


@dataclass
class Method:
    """window: retrain on so many days; otherwise one model goes on, or (stale) stays after the days of tuning.
    rates: hydra overrides by data set, found by --tune on the days before those that are reported.
    """

    rates: dict[str, list[str]]
    window: int | None = None
    stale: bool = False
    batch_teacher: bool = False
    replayed: float = 0.0  # rows of the reservoir, as a share of a day's


def rates(sparse: float, dense: float, *more: str) -> list[str]:
    adagrad = ["optimizer.sparse.name=rowwise_adagrad", f"optimizer.sparse.lr={sparse}"]
    return [*adagrad, f"optimizer.dense.lr={dense}", *more]


def both(*more: str) -> dict[str, list[str]]:
    return {"synthetic": rates(0.006, 0.004, *more), "movielens": rates(0.1, 0.003, *more)}


SELF = ["trainer.distil.kind=self", "trainer.distil.weight=0.5", "optimizer.sparse.old_rows_factor=1.0"]
BATCH = ["trainer.distil.kind=batch", "trainer.distil.teacher=set-by-driver", *SELF[1:]]
METHODS = {
    "stale": Method(both(), stale=True),
    "window of 7 days": Method(both(), window=WINDOW),
    "warm start": Method(both()),
    "IncCTR, KD-self": Method(both(*SELF)),
    "IncCTR, KD-batch": Method(both(*BATCH), batch_teacher=True),
    "IncCTR, KD-self, replay": Method(both(*SELF), replayed=0.25),
}


class Model:
    """One model that lives from day to day: what the daily engine does, without its states on disk."""

    def __init__(self, days: Days, overrides: list[str], seed: int, process: Process, folder: Path) -> None:
        self.days, self.process, self.folder = days, process, folder
        paths = [f"data.path={days.folder}", f"trainer.run_dir={folder}", f"trainer.seed={seed}"]
        self.config = load_config([*COMMON, *overrides, *paths], "")
        self.config.data.days = days.names[:1]
        self.trainer = Trainer(self.config, process)
        self.seconds = 0.0

    def reader(self, days: list[str], replay: Path | None = None, *, training: bool = False) -> ParquetReader:
        path = f"{self.config.data.path}/{self.config.data.train}"
        more = None if replay is None else str(replay)
        schema = self.trainer.engine.schema
        return open_reader(self.config, schema, self.process, path, training=training, days=days, replay=more)

    def score(self, days: list[str]) -> dict[str, np.ndarray]:
        """Predictions of the model as it is: before the days are trained on, the logits of KD-self are among them."""
        evaluate(self.trainer.engine.model, self.reader(days), self.process, self.folder / "predictions", "day")
        table = pq.read_table(self.folder / "predictions" / "day-00000.parquet")
        return {name: table[name].to_numpy() for name in ("prediction", "label", "row")}

    def train(self, days: list[str], replay: Path | None = None, *, teach: bool = True) -> None:
        """One pass over days that were scored just now. teach: distil, if the method does."""
        reader, engine, began = self.reader(days, replay, training=True), self.trainer.engine, time.process_time()
        distil = engine.distil
        if engine.dynamic:
            engine.dynamic.begin_period()
        if distil and teach:
            logits = self.folder / "predictions"
            if distil.config.kind == "batch":
                logits = self.folder / "teacher"
                score_teacher(self.config, engine.model, self.reader(days), self.process, logits, "day")
            distil.begin_period(read_logits(logits, "day", reader.rows))
        engine.distil = distil if teach else None
        for batch in reader.epoch(0):
            engine.train_step(batch)
        engine.distil = distil
        self.seconds += time.process_time() - began

    def close(self) -> None:
        self.trainer.log.close()
        del self.trainer
        gc.collect()  # tables are in cycles of references, and a run makes a hundred models


def follow(
    days: Days, method: Method, overrides: list[str], seed: int, process: Process, count: int, frozen: int
) -> list[dict[str, float]]:
    """Return metrics of days 1 to count - 1, each before it is trained on, and processor seconds of the training before
    it."""
    results, names = [], days.names
    replay: Path | None = None
    with tempfile.TemporaryDirectory() as root:
        folders = (Path(root) / str(i) for i in range(10**6))
        model = Model(days, overrides, seed, process, next(folders))
        for i in range(1, count):
            model.seconds = 0.0
            if method.window:
                model.close()
                model = Model(days, overrides, seed, process, next(folders))
                model.train(names[max(0, i - method.window) : i])
            elif not (method.stale and i > frozen):
                if method.batch_teacher and i > 1 and (i - 2) % WINDOW == 0:
                    teach_by_window(model, names[max(0, i - 1 - WINDOW) : i - 1], overrides, seed, next(folders))
                model.train([names[i - 1]], replay, teach=i > 1)
            if method.replayed:
                before, sample = replay, Path(root) / f"replay-{i}.parquet"
                size = int(method.replayed * len(days.new[names[0]]))
                schema, where = model.trainer.engine.schema, str(days.folder)
                add_to_reservoir(before, where, names[i - 1], schema, size, seed, sample, [names[i - 1]])
                replay = sample
            found = model.score([names[i]])
            new = days.new[names[i]][found["row"]]
            of_new = {name: column[new] for name, column in found.items()}
            results.append(metrics(found) | {"new": metrics(of_new)["auc"], "seconds": model.seconds})
        model.close()
    return results


def teach_by_window(model: Model, days: list[str], overrides: list[str], seed: int, folder: Path) -> None:
    """Train an outdated teacher: a model of the window before, trained anew once in so many days."""
    plain = [o for o in overrides if "distil" not in o]
    teacher = Model(model.days, plain, seed, model.process, folder)
    teacher.train(days)
    save_model(teacher.trainer.engine.model, folder / "best", model.process, 0)
    teacher.close()
    model.seconds += teacher.seconds
    model.config.trainer.distil.teacher = str(folder)


def metrics(found: dict[str, np.ndarray]) -> dict[str, float]:
    prediction, label = found["prediction"], found["label"]
    return {"auc": _number(auc(prediction, label)), "logloss": _number(logloss(prediction, label))}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def online(days: Days, overrides: list[str], seed: int, process: Process) -> dict[str, float]:
    """Return the AUC over the stream behind the first partition: of a model trained on that alone, and of models that
    go on."""
    stream, found = days.names[1:], {}
    for pieces in (0, 10, 50, 100):
        with tempfile.TemporaryDirectory() as root:
            model, scored = Model(days, overrides, seed, process, Path(root) / "run"), []
            model.train(days.names[:1])
            for piece in np.array_split(stream, max(1, pieces)):
                scored.append(model.score(piece.tolist()))
                if pieces:
                    model.train(piece.tolist())
            model.close()
        together = {name: np.concatenate([one[name] for one in scored]) for name in scored[0]}
        found[f"sync every 1/{pieces}" if pieces else "batch"] = metrics(together)["auc"]
    return found


def main(options: argparse.Namespace, process: Process) -> None:
    base, column = DATA[options.data]
    logging.disable(logging.INFO)  # of hundreds of runs
    with tempfile.TemporaryDirectory() as folder:
        days = make_days(options, Path(folder), column)
        seeds = range(1, options.seeds + 1)
        if options.online:
            chosen = [*base, *METHODS["warm start"].rates[options.data], *options.overrides]
            found = [online(days, chosen, seed, process) for seed in seeds]
            for name in found[0]:
                gain = [one[name] - one["batch"] for one in found]
                print(f"{name:<20}{spread([one[name] for one in found])}   gain {spread(gain)}", flush=True)
            return
        first = 1 if options.tune else options.tune_days
        last = options.tune_days if options.tune else len(days.names)
        print(
            f"{len(days.names)} days, {len(days.new[days.names[0]])} rows on the first; mean of {first} to {last - 1}"
        )
        print(f"{'':<32}{'AUC':>18}{'logloss':>18}{'AUC of new':>18}{'CPU seconds/day':>18}")
        for name in options.methods or METHODS:
            method = METHODS[name]
            for tried in itertools.product(*(one.split("=")[1].split(",") for one in options.tune)):
                pairs = [f"{one.split('=')[0]}={value}" for one, value in zip(options.tune, tried, strict=True)]
                overrides = [*base, *method.rates[options.data], *options.overrides, *pairs]
                runs = [follow(days, method, overrides, seed, process, last, options.tune_days) for seed in seeds]
                means = [
                    [float(np.nanmean([day[key] for day in run[first - 1 :]])) for run in runs]
                    for key in ("auc", "logloss", "new", "seconds")
                ]
                print(
                    f"{name + ' ' + ' '.join(tried):<32}" + "".join(f"{spread(mean):>18}" for mean in means), flush=True
                )


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=DATA)
    parser.add_argument("overrides", nargs="*", help="hydra overrides of all methods")
    parser.add_argument("--input", help="folder of the MovieLens files")
    parser.add_argument("--rows", type=int, default=350_000, help="synthetic: of all days")
    parser.add_argument("--days", type=int, default=14)
    parser.add_argument("--data-seed", type=int, default=2026)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tune-days", type=int, default=5, help="first days, by which rates are chosen; not reported")
    parser.add_argument("--tune", nargs="*", default=[], metavar="KEY=A,B", help="try these on the first days alone")
    parser.add_argument("--methods", nargs="*", choices=METHODS)
    parser.add_argument("--online", action="store_true", help="a stream that is scored and trained on piece by piece")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run(lambda: (arguments, "cpu", 300.0), main))
