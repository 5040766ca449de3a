"""Helen beside Adam at its best learning rate: AUC on synthetic rows and on MovieLens, and the cost of a step.

    python -m tessera.scripts.bench.helen --movielens FOLDER    # of the three files of conf/data/ml100k.yaml
    python -m tessera.scripts.bench.helen --seeds 4 5           # what is in build/bench/helen is not done again

Both tune on the valid split with the first seed: Adam its learning rate, Helen rho at that rate. Differences on test
rows have their interval by the paired bootstrap.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tessera.ctr.data.convert.output import Writing
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.metrics.compare import PairedRows, paired_bootstrap
from tessera.ctr.runs.score_rows import config_to_score, score_rows
from tessera.distributed import process as processes
from tessera.distributed.rank import Process
from tessera.scripts.bench.fits import Fits, Result, Setting, mean_and_spread, trained

ADAM = ["optimizer.sparse.name=adam", "model.embedding_dim=8", "model.hidden=[64,32]", "embedding.rows=100000"]
RATES, RHOS = (0.0003, 0.001, 0.003, 0.01), (0.01, 0.05, 0.2)
EPOCHS = {"synthetic": 2, "movielens": 15}


class Experiment:
    """Fits of both methods on both data sets. Predictions of the test split lie beside the results, as arrays."""

    def __init__(self, fits: Fits, data: dict[str, Path], process: Process, rows: int) -> None:
        self.fits, self.data, self.process, self.rows = fits, data, process, rows

    def fit(self, of: str, seed: int, name: str, setting: Setting) -> Result | None:
        made_of = {"of": of, "seed": seed, "setting": setting, "rows": self.rows, "fixed": ADAM, "epochs": EPOCHS[of]}
        return self.fits.once(name, made_of, partial(self._fitted, of, seed, name, setting))

    def _fitted(self, of: str, seed: int, name: str, setting: Setting) -> Result:
        data = "synthetic" if of == "synthetic" else "ml100k"
        with tempfile.TemporaryDirectory() as scratch:
            run_dir = Path(scratch) / "run"
            fixed = [f"data={data}", f"data.path={self.data[of]}", f"trainer.run_dir={run_dir}", f"trainer.seed={seed}"]
            fixed += [*ADAM, "trainer.batch_size=1024", f"trainer.epochs={EPOCHS[of]}", "trainer.early_stop.patience=2"]
            fixed += ["trainer.device=cpu", "trainer.threads=1", "trainer.log_every=1000", "embedding.clock=wall"]
            began = time.process_time()
            trainer = trained([*fixed, *(f"{key}={value}" for key, value in setting.items())], self.process)
            cost = (time.process_time() - began) / max(1, trainer.engine.step)
            config = config_to_score(run_dir, [])
            test = self.data[of] / str(config.data.test)
            scored = score_rows(config, self.process, run_dir, test, Path(scratch) / "scores", ["label"])
            table = pq.read_table([scored.folder / one for one in scored.names], partitioning=None)
            path = self.fits.folder / f"{name}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            columns = {one: table[one].to_numpy() for one in ("prediction", "label")}
            np.savez_compressed(path, **columns)
        return {"watched": trainer.progress.best, "milliseconds of a step": round(1000 * cost, 2)}

    def compared(self, of: str, seeds: Sequence[int]) -> str:
        """Tune, fit all seeds and return lines of a table."""
        tune = partial(self.fit, of, seeds[0])
        rates = {"optimizer.sparse.lr": RATES, "optimizer.dense.lr": (0.001,)}
        adam = self.fits.best_setting(f"{of}/adam", rates, tune)
        if adam is None:
            return f"{of}: fits are missing"
        grid = {**{key: (value,) for key, value in adam.items()}, "optimizer.helen.rho": RHOS}
        helen = self.fits.best_setting(f"{of}/helen", grid, tune)
        if helen is None:
            return f"{of}: fits are missing"
        lines, costs = [], []
        for seed in seeds:
            names = [f"{of}/seed-{seed}/{method}" for method in ("adam", "helen")]
            made = [self.fit(of, seed, name, one) for name, one in zip(names, (adam, helen), strict=True)]
            if any(one is None for one in made):
                continue
            costs.append([one["milliseconds of a step"] for one in made if one is not None])
            first, second = (np.load(self.fits.folder / f"{name}.npz") for name in names)
            rows = PairedRows(first["prediction"], second["prediction"], first["label"] == 1)
            found = paired_bootstrap(rows, 300, seed)
            cells = [
                f"{values.mean():+.5f} [{np.quantile(values, 0.025):+.5f}, {np.quantile(values, 0.975):+.5f}]"
                for values in (found["auc"], found["logloss"])
            ]
            lines.append(f"| {of} | {seed} | {' | '.join(cells)} |")
        both = [mean_and_spread([one[k] for one in costs], 2) for k in (0, 1)] if costs else ["", ""]
        return "\n".join([*lines, f"{of}: Adam {adam}, Helen {helen}; milliseconds of a step {' and '.join(both)}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/bench/helen"), help="folder of the results")
    parser.add_argument("--rows", type=int, default=100_000, help="of the synthetic set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of models; the first one tunes")
    parser.add_argument("--movielens", type=Path, help="folder of MovieLens-100k; without it synthetic rows alone")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    chosen = parser.parse_args(arguments)
    process = processes.start("cpu", 300.0)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            data = {"synthetic": Path(scratch) / "synthetic"}
            if not chosen.table:
                write_synthetic(SyntheticConfig(rows=chosen.rows, seed=0), data["synthetic"], Writing())
            if chosen.movielens:
                data["movielens"] = chosen.movielens
            experiment = Experiment(Fits(chosen.output, read_only=chosen.table), data, process, chosen.rows)
            print("| data | seed | AUC, Helen - Adam | logloss |\n|---|---|---|---|")
            for of in data:
                print(experiment.compared(of, chosen.seeds), flush=True)
    finally:
        processes.stop(process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
