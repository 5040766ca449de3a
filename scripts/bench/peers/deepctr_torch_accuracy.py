"""Accuracy of deepctr-torch on a synthetic data set of `scripts/prepare.py synthetic`; runs in the environment of
deepctr_torch.sh.

    scripts/bench/peers/deepctr_torch.sh ENVIRONMENT accuracy --data data/synthetic --models DeepFM,PNN --l2 0,1e-5

Ids seen at least --least times in the training split get a row, all others share row 0; numbers are signed logarithms,
missing ones 0, as in conf/data/synthetic.yaml. Its own `fit`, one epoch at a time, with Adam; the epoch and the L2 of
embeddings with the best AUC on the valid split (mean over seeds) are scored on the test split.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import PNN, AutoInt, DCNMix, DeepFM, xDeepFM
from deepctr_torch.models.basemodel import BaseModel
from sklearn.metrics import log_loss, roc_auc_score

BATCH, DIM, HIDDEN = 4096, 16, (400, 400, 400)
MODELS = ("DeepFM", "AutoInt", "PNN", "DCNMix", "xDeepFM")
Inputs = dict[str, np.ndarray]


def read(data: Path, least: int) -> tuple[dict[str, tuple[Inputs, np.ndarray]], dict[str, int]]:
    """Inputs and labels of each split, and the rows that each id column needs."""
    tables = {split: pq.read_table(data / split) for split in ("train", "valid", "test")}
    names = tables["train"].column_names
    labels = {split: table["label"].to_numpy().astype(np.float32) for split, table in tables.items()}
    splits: dict[str, tuple[Inputs, np.ndarray]] = {split: ({}, labels[split]) for split in tables}
    sizes = {}
    for name in (name for name in names if name[0] in "CI" and name[1:].isdigit()):
        columns = {split: table[name].fill_null(0).to_numpy() for split, table in tables.items()}
        if name[0] == "I":
            for split, values in columns.items():
                splits[split][0][name] = (np.sign(values) * np.log1p(np.abs(values))).astype(np.float32)
            continue
        seen, counts = np.unique(columns["train"], return_counts=True)
        known = seen[counts >= least]
        sizes[name] = len(known) + 1
        for split, values in columns.items():
            places = np.searchsorted(known, values).clip(max=max(len(known) - 1, 0))
            splits[split][0][name] = np.where(known[places] == values, places + 1, 0)
    return splits, sizes


def build(name: str, sizes: dict[str, int], numbers: list[str], l2: float, seed: int) -> BaseModel:
    columns = [SparseFeat(column, rows, embedding_dim=DIM) for column, rows in sizes.items()]
    columns += [DenseFeat(column, 1) for column in numbers]
    plain = {"dnn_hidden_units": HIDDEN, "l2_reg_embedding": l2, "device": "cpu", "seed": seed}
    if name == "PNN":
        return PNN(columns, use_inner=True, **plain)
    if name == "AutoInt":
        return AutoInt(columns, columns, att_layer_num=3, att_head_num=2, **plain)
    models = {"DeepFM": DeepFM, "xDeepFM": xDeepFM, "DCNMix": DCNMix}
    return models[name](columns, columns, l2_reg_linear=l2, **plain)


def score(model: BaseModel, inputs: Inputs, labels: np.ndarray) -> tuple[float, float]:
    predictions = model.predict(inputs, 8 * BATCH).ravel().astype(np.float64)
    return roc_auc_score(labels, predictions), log_loss(labels, predictions.clip(1e-7, 1 - 1e-7))


def train(name: str, splits: dict, sizes: dict[str, int], l2: float, seed: int, epochs: int, rate: float) -> dict:
    """Scores of the epoch that is best on the valid split; training ends with the first that is no better."""
    numbers = [column for column in splits["train"][0] if column not in sizes]
    model = build(name, sizes, numbers, l2, seed)
    model.compile(torch.optim.Adam(model.parameters(), lr=rate), "binary_crossentropy", metrics=[])
    best: dict = {}
    for epoch in range(epochs):
        model.fit(*splits["train"], batch_size=BATCH, epochs=1, verbose=0, shuffle=True)
        valid = score(model, *splits["valid"])
        if best and valid[0] <= best["valid"][0]:
            break
        best = {"epoch": epoch + 1, "valid": valid, "weights": copy.deepcopy(model.state_dict())}
    model.load_state_dict(best.pop("weights"))
    return best | {"test": score(model, *splits["test"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", default="DeepFM,AutoInt,PNN,DCNMix")
    parser.add_argument("--l2", default="0,1e-5", help="of embeddings; 1e-5 is its default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--least", type=int, default=1, help="occurrences that an id needs for a row of its own")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1e-3, help="Adam's; 1e-3 is its default")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    splits, sizes = read(options.data, options.least)
    ceiling = json.loads((options.data / "teacher.json").read_text())["splits"]["test"]
    print(f"{sum(sizes.values()):,} rows; no model does better than AUC {ceiling['auc']:.4f}, ", end="")
    print(f"logloss {ceiling['logloss']:.4f} on the test split")
    for name in options.models.split(","):
        for l2 in map(float, options.l2.split(",")):
            runs = [train(name, splits, sizes, l2, seed, options.epochs, options.rate) for seed in options.seeds]
            cells = [f"{name:<10} l2 {l2:g}, epochs {[run['epoch'] for run in runs]}"]
            for split in ("valid", "test"):
                for number, metric in enumerate(("AUC", "logloss")):
                    values = [run[split][number] for run in runs]
                    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                    cells.append(f"{split} {metric} {statistics.fmean(values):.4f}{spread}")
            print(", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
