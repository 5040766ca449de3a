"""Measure the cost of collisions: the same model and table, with every id its own row, and with ids taken modulo m.

    python scripts/bench/collisions.py --seeds 3 experiment=demo optimizer=adam_adagrad data.path=data/synthetic

m is a fraction of a feature's distinct ids in the training split. Both sides run on dynamic tables, so that nothing
but the ids differs: `id % m` is what a hashed table of m rows sees. Mean ± standard deviation over the seeds, on the
test split, of the model kept as best on the valid split; differences are to collisionless, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parent process, which only starts others, needs no torch
    from tessera.ctr.config import Config
    from tessera.ctr.train.trainer import Trainer
    from tessera.distributed.rank import Process

ROOT = Path(__file__).resolve().parents[2]
FRACTIONS = {"collisionless": None, "id % m, m = 1/2": 2, "id % m, m = 1/4": 4, "id % m, m = 1/16": 16}


def train(divisor: int | None, folder: str, overrides: list[str]) -> int:
    """Train one model in this process; its report goes to `folder`."""
    import torch
    from torchrec import KeyedJaggedTensor

    from tessera.ctr.config import load_config
    from tessera.ctr.train.trainer import Trainer
    from tessera.distributed.process import run

    def load() -> tuple[Config, str, float]:
        config = load_config([*overrides, f"trainer.run_dir={folder}"], "")
        return config, config.trainer.device, config.trainer.timeout_seconds

    def fit(config: Config, process: Process) -> None:
        trainer = Trainer(config, process)
        sizes = {}
        if divisor is not None:
            distinct = count_distinct(trainer)
            sizes = {name: -(-count // divisor) for name, count in distinct.items()}

        def collide(module: torch.nn.Module, arguments: tuple[KeyedJaggedTensor]) -> tuple[KeyedJaggedTensor]:
            (ids,) = arguments
            names, counts = ids.keys(), torch.tensor(ids.length_per_key())
            modulus = torch.tensor([sizes[name] for name in names]).repeat_interleave(counts)
            values = ids.values().remainder(modulus)
            return (KeyedJaggedTensor(names, values, ids.weights_or_none(), ids.lengths(), stride=ids.stride()),)

        if sizes:
            tables = trainer.engine.tables
            assert isinstance(tables, torch.nn.Module)
            tables.register_forward_pre_hook(collide)
        trainer.fit()

    return run(load, fit)


def count_distinct(trainer: Trainer) -> dict[str, int]:
    """Return the number of distinct ids of each feature in the training split."""
    import torch

    found: dict[str, list[torch.Tensor]] = {name: [] for name in trainer.engine.schema.id_names}
    for batch in trainer.readers.train.epoch(0):
        for name, values in zip(found, batch.ids.values().split(batch.ids.length_per_key()), strict=True):
            found[name].append(values.unique())
    return {name: max(1, torch.cat(parts).unique().numel()) for name, parts in found.items()}


def child(name: str, seed: int, overrides: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", name, "--folder", folder, *overrides, f"trainer.seed={seed}"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
        return json.loads((Path(folder) / "report.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="hydra overrides of all runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--child", choices=FRACTIONS, help=argparse.SUPPRESS)  # one run, in a process of its own
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return train(FRACTIONS[options.child], options.folder, options.overrides)
    results = {
        name: [child(name, seed, options.overrides) for seed in range(1, options.seeds + 1)] for name in FRACTIONS
    }
    print(f"{' '.join(options.overrides)}, {options.seeds} seeds")
    print(f"{'':<18}{'AUC':>20}{'to collisionless':>20}{'logloss':>20}")
    base = [result["auc"] for result in results["collisionless"]]
    for name, found in results.items():
        auc, logloss = [f["auc"] for f in found], [f["logloss"] for f in found]
        change = [a - b for a, b in zip(auc, base, strict=True)]
        print(f"{name:<18}{spread(auc):>20}{spread(change):>20}{spread(logloss):>20}", flush=True)
    return 0


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    sys.exit(main())
