"""Every tower that reads ordinary columns, on MovieLens-100k and on a synthetic set, with the same budget for each.

    python -m tessera.scripts.bench.towers --movielens FOLDER               # the files of conf/data/ml100k.yaml
    python -m tessera.scripts.bench.towers --movielens FOLDER --budget 20   # all settings instead of the first ones
    python -m tessera.scripts.bench.towers --sets synthetic --towers fcn ecn
    python -m tessera.scripts.bench.towers --table                          # of what is there; trains nothing

Each tower is trained with the first `--budget` of 20 settings (`settings`) and the first seed; the one with the best
AUC on valid rows is trained with the other seeds, too, and test rows are scored by the best epoch of each. Towers are
small: dim 8, hidden layers of 128 and 64. Results lie in build/bench/towers, a file each; what is there is not done
again, and a larger budget goes on from a smaller one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from tessera.ctr.config import load_config
from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.runs.saved_model import load_model
from tessera.ctr.train.evaluate import evaluate
from tessera.distributed import process as processes
from tessera.distributed.rank import Process
from tessera.scripts.bench.fits import Fits, Result, mean_and_spread, trained

TOWERS = (
    *("lr", "fm", "fwfm", "fmfm", "dnn", "wide_deep", "deepfm", "deepfm_p", "ipnn", "opnn", "kpnn", "pin"),
    *("dcn", "dcn_v2", "gdcn", "edcn", "ecn", "fcn", "xdeepfm", "autoint", "autoint_plus", "afn", "afn_plus"),
    *("fibinet", "mask_net", "final_mlp", "final_net", "dlrm", "wukong", "rank_mixer", "fgcnn"),
)
METRICS = ("auc", "logloss")
DIM, WIDTHS = 8, (128, 64)
RATES = ((0.003, 0.003), (0.003, 0.001), (0.001, 0.001), (0.006, 0.003), (0.01, 0.001))  # of rows, of dense weights
DROPOUT, L2 = 0.3, 1e-5
SIZES = {  # what else makes a tower small: the published sizes are those of millions of rows
    "wukong": ["model.fm_vectors=16", "model.linear_vectors=16"],
    "rank_mixer": ["model.width=64"],
    "dlrm": ["model.bottom=[64]"],
    "autoint": ["model.attention_dim=32"],
    "autoint_plus": ["model.attention_dim=32"],
    "xdeepfm": ["model.maps=[8,8]"],
    "fgcnn": ["model.channels=[8,10]"],
    "afn": ["model.products=50"],
    "afn_plus": ["model.products=50"],
}
WITHOUT_DROPOUT = ("autoint", "rank_mixer")  # their key is that of an MLP which they do not have here
COMMON = [
    *("optimizer.sparse.name=adam", "embedding.rows=100000", "trainer.batch_size=1024", "trainer.device=cpu"),
    *("trainer.threads=1", "trainer.log_every=1000000", "export.check=never", "trainer.early_stop.metric=auc"),
]


class DataSet(NamedTuple):
    name: str  # in conf/data
    epochs: int
    patience: int


SETS = {"MovieLens": DataSet("ml100k", 6, 1), "synthetic": DataSet("synthetic", 2, 1)}


@functools.cache
def settings(tower: str) -> tuple[tuple[str, ...], ...]:
    """Return the 20 settings of a tower, the first ones first: learning rates, regularised or not, wide or not.

    Regularised is dropout, or L2 of rows where a tower has none. Wide doubles all hidden layers, or the dim where there
    are none; `lr` has neither, so 10 settings.
    """
    model: Any = OmegaConf.to_container(OmegaConf.create(vars(load_config([f"model={tower}"], ""))["model"]))
    leaves = dict(_leaves(model, "model"))
    dropouts = [key for key in leaves if "dropout" in key.split(".")[-1] and "attention" not in key]
    dropouts = [] if tower in WITHOUT_DROPOUT else dropouts
    hidden = [
        key for key, value in leaves.items() if "hidden" in key.split(".")[-1] and value and isinstance(value, list)
    ]
    of_dim = ["model.embedding_dim"] if "model.embedding_dim" in leaves else []
    found = []
    for factor, (rows, dense), regularised in itertools.product((1, 2), RATES, (False, True)):
        made = [f"optimizer.sparse.lr={rows}", f"optimizer.dense.lr={dense}"]
        if regularised:
            made += [f"{key}={DROPOUT}" for key in dropouts] or [f"embedding.l2={L2}"]
        made += [f"{key}={[factor * width for width in WIDTHS]}" for key in hidden]
        made += [f"{key}={DIM if hidden else factor * DIM}" for key in of_dim]
        found.append(tuple(made + SIZES.get(tower, [])))
    return tuple(dict.fromkeys(found))


def _leaves(mapping: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}.{key}")
        else:
            yield f"{above}.{key}", value


class Experiment:
    """Fits of towers on data sets."""

    def __init__(self, fits: Fits, data: Mapping[str, Path], rows: int, process: Process) -> None:
        self.fits, self.data, self.rows, self.process = fits, data, rows, process

    def fit(self, of: str, tower: str, setting: Sequence[str], seed: int) -> Result | None:
        """Return {split: {metric: value}} and epochs, of the best epoch; None if it is not there and must not be made.

        The name has the place of the setting among all of its tower.
        """
        made_of = {"setting": setting, "seed": seed, "fixed": COMMON, "of": SETS[of]._asdict()}
        made_of |= {"rows": self.rows} if of == "synthetic" else {}
        name = f"{of}/{tower}/{settings(tower).index(tuple(setting))}-{seed}"
        return self.fits.once(name, made_of, partial(self._fitted, of, tower, setting, seed))

    def _fitted(self, of: str, tower: str, setting: Sequence[str], seed: int) -> Result:
        of_set = SETS[of]
        with tempfile.TemporaryDirectory() as scratch:
            fixed = [f"model={tower}", f"data={of_set.name}", f"data.path={self.data[of]}", f"trainer.seed={seed}"]
            fixed += [f"trainer.run_dir={scratch}/run", f"trainer.epochs={of_set.epochs}"]
            trainer = trained(
                [*COMMON, *fixed, f"trainer.early_stop.patience={of_set.patience}", *setting], self.process
            )
            load_model(trainer.engine.model, Path(scratch) / "run/best", self.process)
            result: Result = {"epochs": trainer.progress.epoch}
            for split in ("valid", "test"):
                reader = trainer.readers[split]
                assert reader is not None
                found = evaluate(trainer.engine.model, reader, self.process)
                result[split] = {metric: found[metric] for metric in METRICS}
        return result

    def chosen(self, of: str, tower: str, budget: int, seed: int) -> tuple[Sequence[str], Result] | None:
        """Return the setting with the best AUC on valid rows, and its fit; None if a fit is missing."""
        tried = [(setting, self.fit(of, tower, setting, seed)) for setting in settings(tower)[:budget]]
        there = [(setting, result) for setting, result in tried if result is not None]
        return max(there, key=lambda one: one[1]["valid"]["auc"]) if len(there) == len(tried) else None

    def row(self, of: str, tower: str, budget: int, seeds: Sequence[int]) -> tuple[float, str] | None:
        """Return the mean AUC on test rows and the line of the table; None if a fit is missing."""
        best = self.chosen(of, tower, budget, seeds[0])
        if best is None:
            return None
        more = [self.fit(of, tower, best[0], seed) for seed in seeds[1:]]
        results = [best[1], *(one for one in more if one is not None)]
        if len(results) < len(seeds):
            return None
        cells = [mean_and_spread([one["test"][metric] for one in results]) for metric in METRICS]
        valid = mean_and_spread([one["valid"]["auc"] for one in results])
        short = [
            one.replace("optimizer.", "").replace("model.", "") for one in best[0] if one not in SIZES.get(tower, [])
        ]
        mean = sum(one["test"]["auc"] for one in results) / len(results)
        return mean, f"| {of} | {tower} | {' | '.join(cells)} | {valid} | {', '.join(short)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--movielens", type=Path, help="folder of MovieLens-100k; without it synthetic rows alone")
    parser.add_argument("--output", type=Path, default=Path("build/bench/towers"), help="folder of the results")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), metavar="SET")
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=TOWERS, metavar="TOWER")
    parser.add_argument("--budget", type=int, default=4, help="settings that each tower tries, of 20")
    parser.add_argument(
        "--rows", type=int, default=80_000, help="of the synthetic set, of which a tenth is valid, a tenth test"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the first one tunes")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    chosen = parser.parse_args(arguments)
    process = processes.start("cpu", 300.0)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            data = {"synthetic": Path(scratch) / "synthetic", "MovieLens": chosen.movielens}
            sets = [one for one in chosen.sets if one == "synthetic" or chosen.movielens or chosen.table]
            if "synthetic" in sets and not chosen.table:
                write_synthetic(SyntheticConfig(rows=chosen.rows), data["synthetic"], Writing())
            experiment = Experiment(Fits(chosen.output, read_only=chosen.table), data, chosen.rows, process)
            for of in sets:
                rows = [experiment.row(of, tower, chosen.budget, chosen.seeds) for tower in chosen.towers]
                print("| data | tower | test AUC | logloss | valid AUC | chosen |\n|---|---|---|---|---|---|")
                print("\n".join(line for _, line in sorted((one for one in rows if one), reverse=True)), flush=True)
    finally:
        processes.stop(process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
