"""Measure accuracy and memory of row formats: trains each of them with several seeds and prints a table.

    python scripts/bench/low_precision.py --output runs/formats --seeds 3 experiment=ml100k_deepfm data.path=FOLDER

Each run is one call of `scripts/train.py` with the overrides given here; finished runs in --output are not repeated.
Mean ± standard deviation over the seeds, on the test split; bytes per row count values, state, scale, time, count
and id of one row with its place in the id map.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALPT = ["embedding.alpt.every=1"]
INT8 = ["embedding.format=int8"]
# Few codes want a smaller range, and scales, which are larger, may want a larger rate: ranges of 0.1 and 0.3 and
# rates of 2e-5 to 1e-2 were compared by the AUC on the valid split, one seed, DeepFM. MovieLens-100k wants the fast
# rate, 2,000,000 synthetic rows in one pass the default one.
INT4, INT2 = (["embedding.format=" + name, "embedding.range=0.1"] for name in ("int4", "int2"))
FAST = [*ALPT, "embedding.alpt.lr=1e-3", "embedding.alpt.gradient_scale=none"]
VARIANTS = {
    "fp32": [],
    "fp16": ["embedding.format=fp16"],
    "bf16": ["embedding.format=bf16"],
    "int8-LPT-nearest": [*INT8, "embedding.rounding=nearest"],
    "int8-LPT-stochastic": INT8,
    "int8-ALPT": [*INT8, *ALPT],
    "int4-LPT": INT4,
    "int4-ALPT": [*INT4, *ALPT],
    "int4-ALPT-fast": [*INT4, *FAST],
    "int2-LPT": INT2,
    "int2-ALPT": [*INT2, *ALPT],
    "int2-ALPT-fast": [*INT2, *FAST],
}


def train(folder: Path, overrides: list[str], launcher: list[str]) -> dict[str, float]:
    """Return AUC, logloss and bytes per row of one run, which is trained unless its folder holds a report."""
    report = folder / "report.json"
    if not report.exists():
        command = [*launcher, sys.executable, "scripts/train.py", *overrides, f"trainer.run_dir={folder}"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    found = json.loads(report.read_text())
    # The plan: a heading, column names, one line per table (name, rows, dim, bytes per row, ...), the sum.
    rows = [line.split() for line in (folder / "plan.txt").read_text().splitlines()[2:-1]]
    bytes_per_row = statistics.mean(int(row[3]) for row in rows)
    return {"auc": found["auc"], "logloss": found["logloss"], "bytes": bytes_per_row}


def show(name: str, results: list[dict[str, float]]) -> None:
    cells = []
    for metric in ("auc", "logloss"):
        values = [result[metric] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):.5f} ± {spread:.5f}")
    print(f"{name:<22}{cells[0]:>22}{cells[1]:>22}{results[0]['bytes']:>16.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy and memory of row formats.")
    parser.add_argument("overrides", nargs="*", help="hydra overrides of all runs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--launcher", default="", help="command put before each run, such as `nice -n 5`")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for seed in range(1, options.seeds + 1):
        for name in options.variants:
            overrides = [*options.overrides, *VARIANTS[name], f"trainer.seed={seed}"]
            folder = (options.output / f"{name}-{seed}").resolve()
            results[name].append(train(folder, overrides, options.launcher.split()))
        print(f"{f'{seed} seed(s)':<22}{'AUC':>22}{'logloss':>22}{'bytes per row':>16}")
        for name in options.variants:
            show(name, results[name])


if __name__ == "__main__":
    main()
