"""Conversion rates of models over several labels on the synthetic funnel, on clicked rows and on all.

    python -m tessera.scripts.bench.funnel                # tunes, trains and prints a table; 5 minutes on one core
    python -m tessera.scripts.bench.funnel --seeds 4 5    # what is in build/bench/funnel is not done again
    python -m tessera.scripts.bench.funnel --table        # of what is there

Models of one label are the same net without the other label's loss: of purchases, it learns from clicked rows alone.
All have the same widths, Adam for weights and rows, and the epoch that was best on the valid split. Each has four
settings, of which the one counts that is best on the valid split of another draw of the data (`--tune-seed`), by what
a log knows: the mean AUC of its labels, purchases on clicked rows. They are two learning rates of rows and, of nets
whose labels share a loss, two weights of purchases, which count in a tenth of the rows, so that they are learnt later
than clicks, and one epoch has to do for both. The others have dropout in the place of that weight.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.synthetic_funnel import FunnelConfig, write_funnel
from tessera.ctr.metrics.exact import auc
from tessera.ctr.runs.score_rows import config_to_score, score_rows
from tessera.distributed import process as processes
from tessera.distributed.rank import Process
from tessera.scripts.bench.fits import Fits, Result, Setting, in_words, mean_and_spread, trained

NET, HEAD = "[64,32]", "[16]"
LABELS = "data.schema.labels=[{{name: click, weight: {click}}}, {{name: buy, where: click, weight: {buy}}}]"
CLICKS, PURCHASES = "clicks alone", "purchases on clicked rows alone"
MODELS = {
    CLICKS: ["model=dnn", f"model.hidden={NET}", LABELS.format(click=1, buy=0)],
    PURCHASES: ["model=dnn", f"model.hidden={NET}", LABELS.format(click=0, buy=1)],
    "shared bottom": ["model=shared_bottom", f"model.bottom={NET}", f"model.head={HEAD}"],
    "MMoE": ["model=mmoe", f"model.expert={NET}", f"model.head={HEAD}", "model.gate=[]"],
    "MMoE, labels weighed alike": ["model=mmoe", f"model.expert={NET}", f"model.head={HEAD}", "model.gate=[]"],
    "PLE": ["model=ple", f"model.expert={NET}", f"model.head={HEAD}", "model.gate=[]"],
    "DBMTL": ["model=dbmtl", f"model.bottom={NET}", f"model.head={HEAD}", f"model.relation={HEAD}"],
    "ESMM": ["model=esmm", f"model.hidden={NET}"],
    "GNOLR": [
        *("model=gnolr", f"model.hidden={NET}", "model.user=[user_id,device,place,hour]"),
        *("model.shares=[0.1,0.02]", "model.slopes=[3.0,1.6]"),
    ],
}
WATCHED = {CLICKS: "click.auc", PURCHASES: "buy.auc"}  # of the others: auc, the mean
COLUMNS = {"click": "CTR", "buy": "CVR, clicked rows", "buy_on_all_rows": "CVR, all rows", "click_and_buy": "CTCVR"}
NOT_LEARNT = {CLICKS: ("buy", "buy_on_all_rows", "click_and_buy"), PURCHASES: ("click", "click_and_buy")}
RATES: dict[str, tuple[float, ...]] = {"optimizer.sparse.lr": (0.001, 0.002)}
BUY_WEIGHT = "weight of buy"
WEIGHED = ("shared bottom", "MMoE", "PLE", "DBMTL")
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    model: RATES | ({BUY_WEIGHT: (1.0, 5.0)} if model in WEIGHED else {"model.dropout": (0.0, 0.2)}) for model in MODELS
}
GRID["MMoE, labels weighed alike"] = RATES  # a single model has no other label to weigh


class Experiment:
    """Data of each seed, written when a fit needs it, and fits on it."""

    def __init__(self, fits: Fits, scratch: Path, process: Process, chosen: argparse.Namespace) -> None:
        self.fits, self.scratch, self.process = fits, scratch, process
        self.made_of = {name: getattr(chosen, name) for name in ("rows", "users", "items")}
        self.epochs = chosen.epochs

    def data(self, seed: int) -> Path:
        """Return the folder of a seed's data, and have its ceilings among the results."""
        folder = self.scratch / f"data-{seed}"
        if not folder.exists():
            config = FunnelConfig(**self.made_of, valid=0.2, test=0.3, seed=seed)
            write_funnel(config, folder, Writing(row_group_rows=4096))
        return folder

    def ceilings(self, seed: int) -> Result | None:
        """Return the best AUC that a model can have on the test split of a seed, by column."""

        def of_teacher() -> Result:
            splits = json.loads((self.data(seed) / "teacher.json").read_text())["splits"]
            return {name: one["auc"] for name, one in splits["test"]["tasks"].items()}

        return self.fits.once(f"seed-{seed}/ceilings", self.made_of, of_teacher)

    def fit(self, name: str, model: str, seed: int, setting: Setting, *, test: bool) -> Result | None:
        """Return a model's fit: `watched`, by which settings are chosen, and AUC on the test split by column."""
        own = [*MODELS[model], f"trainer.early_stop.metric={WATCHED.get(model, 'auc')}", f"trainer.seed={seed}"]
        for key, value in setting.items():
            own.append(LABELS.format(click=1, buy=value) if key == BUY_WEIGHT else f"{key}={value}")
        made_of = self.made_of | {"overrides": own, "epochs": self.epochs, "seed": seed}
        return self.fits.once(name, made_of, partial(self._fitted, own, seed, test=test))

    def _fitted(self, own: list[str], seed: int, *, test: bool) -> Result:
        data = self.data(seed)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            run_dir = Path(folder) / "run"
            fixed = ["data=synthetic_funnel", f"data.path={data}", "data.test=null", f"trainer.run_dir={run_dir}"]
            fixed += ["model.embedding_dim=8", "embedding.rows=10000", "trainer.batch_size=256"]
            fixed += ["optimizer.sparse.name=adam", "optimizer.dense.lr=0.001"]
            fixed += [f"trainer.epochs={self.epochs}", "trainer.early_stop.patience=2"]
            fixed += ["trainer.device=cpu", "trainer.threads=1", "trainer.log_every=1000"]
            best = trained([*fixed, *own], self.process).progress.best
            assert best is not None  # a valid split has clicks and purchases
            return {"watched": best} | (measured(data, run_dir, self.process) if test else {})

    def of_model(self, model: str, tune_seed: int, seeds: Sequence[int]) -> tuple[Setting | None, list[Result]]:
        """Return the best setting of a model and the results of the seeds that are there."""
        setting = self.fits.best_setting(
            file_name(model), GRID[model], lambda name, one: self.fit(name, model, tune_seed, one, test=False)
        )
        if setting is None:
            return None, []
        found = [self.fit(f"seed-{seed}/{file_name(model)}", model, seed, setting, test=True) for seed in seeds]
        return setting, [one for one in found if one is not None]


def file_name(model: str) -> str:
    return model.replace(" ", "_")


def measured(data: Path, run_dir: Path, process: Process) -> dict[str, float]:
    """Return AUC on the test split by column; purchases on all rows are those that would be made after a click."""
    keep = ["click", "buy", "would_buy"]
    scored = score_rows(config_to_score(run_dir, []), process, run_dir, data / "test", Path(f"{run_dir}-scores"), keep)
    table = pq.read_table([scored.folder / name for name in scored.names], partitioning=None)
    found = {name: table[name].to_numpy() for name in table.column_names}
    clicked = found["click"] == 1
    values = {
        "click": auc(found["prediction_click"], found["click"]),
        "buy": auc(found["prediction_buy"][clicked], found["buy"][clicked]),
        "buy_on_all_rows": auc(found["prediction_buy"], found["would_buy"]),
        "click_and_buy": auc(found["prediction_click_and_buy"], found["buy"]),
    }
    return {name: value for name, value in values.items() if value is not None}


def table(results: dict[str, tuple[str, list[Result]]]) -> str:
    """Return markdown: the mean of the seeds and their spread. results: by model, its setting in words and its runs."""
    lines = [f"| model | {' | '.join(COLUMNS.values())} | seeds | chosen |", "|---" * (len(COLUMNS) + 3) + "|"]
    for name, (setting, runs) in results.items():
        if not runs:
            continue
        hidden = NOT_LEARNT.get(name, ())
        cells = ["" if column in hidden else mean_and_spread([run[column] for run in runs]) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} | {setting} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/bench/funnel"), help="folder of the results")
    parser.add_argument("--rows", type=int, default=60_000, help="a fifth of them for valid, three tenths for test")
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of data and models")
    parser.add_argument("--tune-seed", type=int, default=0, help="of the data on which learning rates are chosen")
    parser.add_argument("--epochs", type=int, default=6, help="at most; a model stops after two that are not better")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    chosen = parser.parse_args(arguments)
    process = processes.start("cpu", 300.0)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            fits = Fits(chosen.output, read_only=chosen.table)
            experiment = Experiment(fits, Path(scratch), process, chosen)
            results: dict[str, tuple[str, list[Result]]] = {}
            # All models of the first seed, then those of the next one.
            for last in range(len(chosen.seeds) if chosen.table else 1, len(chosen.seeds) + 1):
                seeds = chosen.seeds[:last]
                for model in chosen.models:
                    setting, runs = experiment.of_model(model, chosen.tune_seed, seeds)
                    results[model] = (in_words(setting), runs)
                ceilings = [one for one in map(experiment.ceilings, seeds) if one is not None]
                results["best possible"] = ("", ceilings)
                print(table(results), flush=True)
    finally:
        processes.stop(process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
