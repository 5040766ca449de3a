"""Fit the calibration of a trained model on the valid split (`trainer.calibration`), label by label, and note what the
numbers were before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torchrec.distributed.model_parallel import DistributedModelParallel

from tessera.ctr.data.labels import Label
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.metrics.exact import summarise
from tessera.ctr.metrics.score_table import score_table
from tessera.ctr.metrics.tasks import answers_of
from tessera.ctr.models.calibration import KNOTS, Calibration, Isotonic, Platt, calibration_of
from tessera.ctr.report.predictions import read_predictions
from tessera.ctr.report.result import CALIBRATION, PREDICTIONS, answer_folder
from tessera.ctr.train.evaluate import evaluate
from tessera.distributed.atomic import write_text
from tessera.distributed.collectives import on_first_rank, wait_for_all
from tessera.distributed.rank import Process

FITTED_ON = "valid"
BEFORE = ".before"  # in the folder of the result: predictions as they were, removed when they are measured
METRICS = ("auc", "logloss", "normalized_entropy", "calibration", "expected_calibration_error")
STEPS, ENOUGH = 100, 1e-12  # of Newton's method; of its decrement


def calibrate(
    model: DistributedModelParallel,
    readers: dict[str, ParquetReader],
    labels: Sequence[Label],
    process: Process,
    result: Path,
    say: Callable[[str], None],
) -> None:
    """Fit the calibration of the model on the valid split, for all ranks, and write what the metrics of each split were
    before into `result`, for the report.

    readers: of the splits, valid among them. say: told how each label came out.
    """
    calibration = calibration_of(model.module.tower)
    assert calibration is not None  # the configuration asks for one
    calibration.reset()
    before = result / BEFORE / PREDICTIONS
    for split, reader in readers.items():
        evaluate(model, reader, process, before, split)
    wait_for_all()  # all predictions are written
    process.stage = "calibration"
    kind = "platt" if isinstance(calibration, Platt) else "isotonic"
    fits = on_first_rank(process, lambda: _fit_all(kind, labels, before, result))
    for number, fit in enumerate(fits):
        name = f"{labels[number].name} · " if len(labels) > 1 else ""
        say(f"calibration · {name}{fit['said']}")
        take(calibration, number, fit)


def take(calibration: Calibration, number: int, fit: dict[str, Any]) -> None:
    """Fill in what was fitted for a label; nothing where it was not."""
    if isinstance(calibration, Platt) and "slope" in fit:
        calibration.set(number, fit["slope"], fit["intercept"])
    elif isinstance(calibration, Isotonic) and "logit" in fit:
        calibration.set(number, fit["logit"], fit["probability"])


def _fit_all(kind: str, labels: Sequence[Label], before: Path, result: Path) -> list[dict[str, Any]]:
    fits: list[dict[str, Any]] = []
    for answer in answers_of(labels):
        folder = answer_folder(before, answer.name)
        if answer.label.is_number:
            fits.append({"said": "a number, which is left as it is"})
            continue
        fit = {"said": "the product of calibrated labels"} if answer.joint else fit_of(kind, *_rows(folder))
        if not answer.joint:
            fits.append(fit)
        measured = {}
        for split, rows in read_predictions(folder).items():
            metrics = summarise(score_table(rows), None)
            measured[split] = {name: metrics[name] for name in METRICS}
        told = {"kind": kind, "fitted_on": FITTED_ON, "said": fit["said"], "before": measured}
        place = answer_folder(result / PREDICTIONS, answer.name).parent
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / CALIBRATION, json.dumps(told, indent=1) + "\n")
    shutil.rmtree(result / BEFORE)
    return fits


def _rows(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits, labels and weights of the valid split, float64 [n] each."""
    columns = ["logit", "label", "weight"]
    tables = [
        pq.read_table(path, columns=columns, partitioning=None)
        for path in sorted(folder.glob(f"{FITTED_ON}-*.parquet"))
        if pq.read_metadata(path).num_rows
    ]
    parts = [np.concatenate([table[name].to_numpy() for table in tables] or [np.zeros(0)]) for name in columns]
    logit, label, weight = (part.astype(np.float64) for part in parts)
    counted = weight > 0
    return logit[counted], label[counted], weight[counted]


def fit_of(kind: str, logit: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """Return what a calibration takes over for one label, as plain numbers, with `said`, one sentence; that alone where
    nothing can be fitted: without both classes, or where higher logits mean fewer positives.

    logit, label (0 or 1), weight: float64 [n], of positive weight.
    """
    if not (label > 0).any() or not (label <= 0).any():
        return {"said": f"left as it is: one class only in {len(label):,} rows"}
    if kind == "platt":
        slope, intercept = fit_platt(logit, label, weight)
        said = f"slope {slope:.4f}, intercept {intercept:+.4f}, of {len(label):,} rows"
        if not slope > 0:
            return {"said": f"left as it is: {said}, which would turn the order of rows around"}
        return {"slope": slope, "intercept": intercept, "said": said}
    knots, values = fit_isotonic(logit, label, weight)
    said = f"{len(knots):,} knots, of {len(label):,} rows"
    if not values[-1] > values[0]:
        return {"said": f"left as it is: higher logits do not mean more positives in {len(label):,} rows"}
    return {"logit": knots.tolist(), "probability": values.tolist(), "said": said}


def fit_platt(logit: np.ndarray, label: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept with the least weighted cross-entropy to Platt's targets, (N1 + 1) / (N1 + 2) and
    1 / (N0 + 2) where N are the weights of the classes (Platt 1999, section 2.2), by Newton's method; as
    `CalibratedClassifierCV(method="sigmoid")` of scikit-learn has it."""
    positive = label > 0
    ones, zeros = float(weight[positive].sum()), float(weight[~positive].sum())
    target = np.where(positive, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    inputs = np.stack([logit, np.ones_like(logit)])
    found = np.array([0.0, np.log((ones + 1) / (zeros + 1))])
    loss = _loss(found, inputs, target, weight)
    for _ in range(STEPS):
        rate = _sigmoid(found @ inputs)
        gradient = inputs @ (weight * (rate - target))
        hessian = (inputs * (weight * rate * (1 - rate))) @ inputs.T + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        decrement, size = float(gradient @ step), 1.0
        while (new := _loss(found - size * step, inputs, target, weight)) > loss and size > 1e-10:
            size /= 2
        if new > loss or decrement < ENOUGH * weight.sum():
            break
        found, loss = found - size * step, new
    return float(found[0]), float(found[1])


def _loss(found: np.ndarray, inputs: np.ndarray, target: np.ndarray, weight: np.ndarray) -> float:
    logit = found @ inputs
    return float(weight @ (np.logaddexp(0, logit) - target * logit))


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logit))


def fit_isotonic(logit: np.ndarray, label: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and probabilities of the knots, float64 [k] each, as scikit-learn's `IsotonicRegression` has them;
    of more than KNOTS evenly chosen ones, the first and the last among them."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(logit, label, sample_weight=weight)
    knots, values = fitted.X_thresholds_, fitted.y_thresholds_
    if len(knots) > KNOTS:
        chosen = np.unique(np.linspace(0, len(knots) - 1, KNOTS).round().astype(np.int64))
        knots, values = knots[chosen], values[chosen]
    return knots, values
