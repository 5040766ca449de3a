"""Calibration behind training: fitted as scikit-learn does, the same in evaluation, scores and exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from sklearn.isotonic import IsotonicRegression

from tessera.ctr.config import load_config
from tessera.ctr.metrics.exact import auc
from tessera.ctr.models import calibration as module
from tessera.ctr.models.calibration import Isotonic, Platt, attach_calibration, calibration_of
from tessera.ctr.models.tower import Tower
from tessera.ctr.report.calibrated import read_calibrated
from tessera.ctr.report.definitions import DEFINITIONS
from tessera.ctr.train.calibrate import _loss, fit_isotonic, fit_of, fit_platt, take
from tessera.embedding.errors import ConfigError
from tests.ctr.train.funnel import options, write_funnel
from tests.ranks import on_ranks


def rows(count: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are too sure of themselves, some of them equal, labels, weights."""
    draw = np.random.default_rng(seed)
    logit = np.round(draw.normal(-1, 2, count), 2).astype(np.float32).astype(np.float64)
    label = (draw.random(count) < 1 / (1 + np.exp(0.7 - 0.5 * logit))).astype(np.float64)
    return logit, label, draw.uniform(0.2, 3, count)


def fitted(kind: str, logit: np.ndarray, label: np.ndarray, weight: np.ndarray) -> Platt | Isotonic:
    made = Platt(1) if kind == "platt" else Isotonic(1)
    take(made, 0, fit_of(kind, logit, label, weight))
    return made


def probability(made: Platt | Isotonic, logit: np.ndarray) -> np.ndarray:
    return torch.sigmoid(made(torch.from_numpy(logit).float())).double().numpy()


def test_platt_is_that_of_scikit_learn():
    private = pytest.importorskip("sklearn.calibration")
    logit, label, weight = rows()
    slope, intercept = fit_platt(logit, label, weight)
    theirs = private._SigmoidCalibration().fit(logit, label, weight)
    assert (slope, intercept) == pytest.approx((-theirs.a_, -theirs.b_), abs=2e-4)
    ones, zeros = weight[label > 0].sum(), weight[label == 0].sum()
    target = np.where(label > 0, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    inputs = np.stack([logit, np.ones_like(logit)])
    ours = _loss(np.array([slope, intercept]), inputs, target, weight)
    assert ours <= _loss(np.array([-theirs.a_, -theirs.b_]), inputs, target, weight) + 1e-9
    assert np.abs(probability(fitted("platt", *rows()), logit) - theirs.predict(logit)).max() < 1e-4


def test_platt_leaves_the_order_and_mends_the_rate():
    logit, label, weight = rows()
    after = probability(fitted("platt", logit, label, weight), logit)
    assert auc(after, label, weight) == auc(1 / (1 + np.exp(-logit)), label, weight)
    assert weight @ after / (weight @ label) == pytest.approx(1, abs=2e-3)


def test_isotonic_is_that_of_scikit_learn():
    logit, label, weight = rows()
    theirs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(logit, label, sample_weight=weight)
    asked = np.concatenate([logit, np.linspace(-20, 20, 999)]).astype(np.float32).astype(np.float64)
    after = probability(fitted("isotonic", logit, label, weight), asked)
    assert np.abs(after - theirs.predict(asked).clip(1e-7, 1 - 1e-7)).max() < 1e-6
    assert (np.diff(after[np.argsort(asked)]) >= -1e-7).all()
    assert weight @ after[: len(logit)] / (weight @ label) == pytest.approx(1, abs=1e-6)


def test_of_many_knots_some_are_kept(monkeypatch):
    monkeypatch.setattr("tessera.ctr.train.calibrate.KNOTS", 8)
    monkeypatch.setattr(module, "KNOTS", 8)
    logit, label, weight = rows()
    knots, values = fit_isotonic(logit, label, weight)
    assert len(knots) == 8 and knots[0] == logit.min() and knots[-1] == logit.max() and (np.diff(values) >= 0).all()
    after = probability(fitted("isotonic", logit, label, weight), knots)
    assert np.abs(after - values.clip(1e-7, 1 - 1e-7)).max() < 1e-6


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
@pytest.mark.parametrize("wrong", ["one class", "turned around"])
def test_what_cannot_be_fitted_is_left_bit_for_bit(kind, wrong):
    logit, label, weight = rows(300)
    label = np.zeros(300) if wrong == "one class" else (logit < -1).astype(np.float64)
    fit = fit_of(kind, logit, label, weight)
    assert set(fit) == {"said"} and fit["said"].startswith("left as it is: ")
    raw = torch.randn(50) * 9
    assert torch.equal(fitted(kind, logit, label, weight)(raw), raw)


class Sure(Tower):
    """Three logits: the inputs."""

    def forward(self, numeric_bn: torch.Tensor, embeddings: dict) -> torch.Tensor:
        return numeric_bn


def test_each_label_has_its_own_and_training_has_none():
    tower, logits = Sure(), torch.randn(20, 3)
    attach_calibration(tower, "platt", 3)
    made = calibration_of(tower)
    made.set(1, 0.5, -1.0)
    assert torch.equal(tower(logits, {}), logits), "towers train on raw logits"
    found = tower.eval()(logits, {})
    assert torch.equal(found[:, [0, 2]], logits[:, [0, 2]]) and torch.equal(found[:, 1], logits[:, 1] * 0.5 - 1)
    assert set(tower.state_dict()) == {f"calibration.{name}" for name in ("fitted", "slope", "intercept")}
    made.reset()
    assert torch.equal(tower(logits, {}), logits)


def test_it_needs_a_valid_split():
    with pytest.raises(ConfigError, match="trainer.calibration is platt, but data.valid is null; expected a split"):
        load_config(["data.path=/x", "trainer.calibration=platt", "data.valid=null"], "")


def test_the_report_reads_what_was_before(tmp_path):
    metrics = {definition.key: 0.5 for definition in DEFINITIONS}
    before = {"valid": {**metrics, "logloss": 0.7}}
    told = {"kind": "isotonic", "fitted_on": "valid", "said": "9 knots, of 10 rows", "before": before}
    (tmp_path / "calibration.json").write_text(json.dumps(told))
    found = read_calibrated(tmp_path, {"valid": metrics})
    assert found.table().columns == ["metric", "valid, before", "valid, after"]
    assert ["Logloss", "0.7000", "0.5000"] in found.table().rows
    assert found.sentence().startswith("Isotonic, fitted on valid: 9 knots, of 10 rows. Rows may tie")
    assert read_calibrated(tmp_path / "nowhere", {}) is None


def fit_run(process, data: str, folder: str, overrides: list[str]) -> None:
    from tessera.ctr.train.trainer import Trainer

    Trainer(load_config(options(Path(data), Path(folder), "mmoe", *overrides), ""), process).fit()


def predictions(folder: Path, split: str = "valid") -> pa.Table:
    """The rows of a split over all ranks, in the order of the data."""
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    return pa.concat_tables([pq.read_table(path, partitioning=None) for path in paths]).sort_by("row")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_one_model_says_the_same_everywhere(tmp_path, kind):
    """Trained on two ranks, scored on one, by an export, and calibrated label by label."""
    from tessera.ctr.export.export import Options, export_model
    from tessera.ctr.export.source import source_of_run
    from tessera.ctr.runs.score import run_config, score_run
    from tessera.ctr.serving import Scorer
    from tests.distributed.saved_tables import alone

    data, run = write_funnel(tmp_path / "data"), tmp_path / "run"
    on_ranks(2, fit_run, str(data), str(run), [f"trainer.calibration={kind}"])
    for task in ("click", "buy"):
        table = predictions(run / "tasks" / task / "predictions")
        label, weight = table["label"].to_numpy().astype(float), table["weight"].to_numpy().astype(float)
        values = json.loads((run / "tasks" / task / "report.json").read_text())
        told = values["calibrated"]["splits"]["valid"]
        assert weight @ table["prediction"].to_numpy() / (weight @ label) == pytest.approx(1, abs=0.02)
        assert told["after"]["logloss"] <= told["before"]["logloss"] + 1e-4
        if kind == "platt":
            assert told["after"]["auc"] == pytest.approx(told["before"]["auc"], abs=1e-6)
        assert "Calibration behind training" in (run / "tasks" / task / "report.html").read_text()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        process = alone()
        score_run(run_config(run, []), process, run, "valid", tmp_path / "again")
        for task in ("click", "buy", "click_and_buy"):
            ours, theirs = (
                predictions(folder / "tasks" / task / "predictions")["prediction"].to_numpy()
                for folder in (run, tmp_path / "again")
            )
            assert np.abs(ours - theirs).max() < 1e-6
        config = run_config(run, [])
        exported = export_model(config, process, source_of_run(config, run, process), tmp_path / "x", [run], Options())
        assert exported.difference <= 1e-6
    finally:
        dist.destroy_process_group()
    rows_of_valid = pq.read_table(data / "valid" / "part-0.parquet", partitioning=None)
    served = Scorer.load(tmp_path / "x", check=True)(rows_of_valid)
    for place, task in enumerate(("click", "buy")):
        ours = predictions(run / "tasks" / task / "predictions")["prediction"].to_numpy()
        assert np.abs(np.sort(served[:, place]) - np.sort(ours)).max() < 1e-6
    with pytest.raises(ConfigError, match="has the calibration that it was trained with"):
        run_config(run, ["trainer.calibration=none"])
