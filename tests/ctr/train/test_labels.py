"""A run over several labels: curves on 1, 2 and 3 ranks, what it writes and says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.daily.bands import out_of_band
from tessera.ctr.daily.config import DailyBandsConfig
from tessera.ctr.metrics.exact import auc, logloss
from tessera.ctr.runs.score_rows import config_to_score, score_rows
from tessera.ctr.train.trainer import Trainer
from tessera.embedding.errors import ConfigError
from tests.ctr.train.funnel import funnel_table, options, write_funnel
from tests.ranks import on_ranks

SEVERAL = (
    "data.schema.labels=[click, {name: buy, where: click, weight: 2}, {name: rare, loss: focal}, "
    "{name: like, loss: pairwise}, {name: price, loss: mse, weight: 0.1}]"
)
CURVES = {
    "mmoe": ["model.dropout=0.2", SEVERAL],
    "esmm": [],
    "gnolr": ["model.user=[user]", "model.shares=[0.5, 0.2]", "model.slopes=[1, 1]"],
    "ple": ["model.expert=[6]", "model.gate=[]", "model.head=[4]", SEVERAL, "trainer.loss_divisor=task"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_funnel(tmp_path_factory.mktemp("funnel") / "data")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Labels that are rare, often unknown, and of which files have very different numbers."""
    folder = tmp_path_factory.mktemp("uneven") / "data"
    for part in range(3):
        table = funnel_table(210, part)
        draw = np.random.default_rng(part)
        click = table["click"].to_numpy() * (part > 0)
        extra = {
            "click": click,
            "buy": pa.array(table["buy"].to_numpy() * click, mask=draw.random(210) < 0.4),
            "rare": (draw.random(210) < 0.02 * part).astype(np.int8),
            "like": pa.array((draw.random(210) < 0.3 * part).astype(np.int8), mask=draw.random(210) < 0.2),
            "price": draw.normal(size=210),
        }
        (folder / "train").mkdir(parents=True, exist_ok=True)
        table = table.drop_columns(["click", "buy"])
        for name, column in extra.items():
            table = table.append_column(name, pa.array(column))
        pq.write_table(table, folder / "train" / f"part-{part}.parquet", row_group_size=70)
    return folder


def curve(process, data: Path, run_dir: Path, models: list[str]) -> dict[str, list[float]]:
    """Losses of the steps of each model, summed over ranks."""
    found = {}
    for model in models:
        more = ["data.valid=null", "data.test=null", "trainer.batch_size=64", "data.lanes=6", *CURVES[model]]
        trainer = Trainer(
            load_config(options(data, run_dir / f"{model}-{process.world_size}", model, *more), ""), process
        )
        losses = []
        for batch in trainer.readers["train"].epoch(0):
            loss, weight = trainer.engine.train_step(batch)
            both = torch.stack([loss, weight]).double()
            torch.distributed.all_reduce(both)
            losses.append(float(both[0] / both[1]))
        trainer.log.close()
        found[model] = losses
    return found


@pytest.fixture(scope="module")
def alone(uneven, tmp_path_factory) -> dict[str, list[float]]:
    return on_ranks(1, curve, uneven, tmp_path_factory.mktemp("runs"), ["mmoe", "esmm"])[0]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_have_one_curve(uneven, alone, tmp_path, world):
    (found, *_) = on_ranks(world, curve, uneven, tmp_path, ["mmoe", "esmm"])
    for model, losses in found.items():
        assert len(losses) == 10
        np.testing.assert_allclose(losses, alone[model], rtol=2e-5, err_msg=model)


@pytest.mark.slow
def test_ranks_have_one_curve_with_other_models_and_divisors(uneven, tmp_path):
    (one,) = on_ranks(1, curve, uneven, tmp_path, ["gnolr", "ple"])
    for world in (2, 3):
        (found, *_) = on_ranks(world, curve, uneven, tmp_path, ["gnolr", "ple"])
        for model, losses in found.items():
            np.testing.assert_allclose(losses, one[model], rtol=2e-5, err_msg=model)


def fit(process, overrides: list[str]) -> None:
    Trainer(load_config(overrides, ""), process).fit()


def fit_and_score(process, data: Path, run_dir: Path) -> None:
    fit(process, options(data, run_dir, "esmm", "trainer.early_stop.metric=buy.auc"))
    score_rows(config_to_score(run_dir, []), process, run_dir, data / "test", run_dir.parent / "scores", keep=["user"])


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A finished run of ESMM over two ranks, with what `tessera score` gives beside it."""
    folder = tmp_path_factory.mktemp("run") / "esmm"
    on_ranks(2, fit_and_score, data, folder)
    return folder


def predicted(run: Path, answer: str, split: str = "test") -> dict[str, np.ndarray]:
    files = sorted((run / "tasks" / answer / "predictions").glob(f"{split}-*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in files]).sort_by("row")
    return {name: table[name].to_numpy() for name in ("prediction", "label", "weight", "row")}


def test_predictions_and_metrics_of_a_funnel(data, run):
    truth = funnel_table(400, 2)
    click, buy, both = (predicted(run, name) for name in ("click", "buy", "click_and_buy"))
    assert (click["label"] == truth["click"].to_numpy()).all() and (click["weight"] == 1).all()
    assert (buy["weight"] == truth["click"].to_numpy()).all(), "CVR counts on clicked rows"
    assert (both["label"] == truth["buy"].to_numpy()).all() and (both["weight"] == 1).all(), "CTCVR on all"
    np.testing.assert_allclose(both["prediction"], click["prediction"] * buy["prediction"], rtol=1e-5)
    report = json.loads((run / "report.json").read_text())
    assert list(report["tasks"]) == ["click", "buy", "click_and_buy"], "in the order of the schema, then joint ones"
    assert report["split"] == "test"
    for name, one in (("click", click), ("buy", buy), ("click_and_buy", both)):
        columns = one["prediction"], one["label"], one["weight"]
        assert report["tasks"][name]["auc"] == pytest.approx(auc(*columns), abs=1e-9)
        assert report["tasks"][name]["logloss"] == pytest.approx(logloss(*columns), abs=1e-9)
    assert report["auc"] == pytest.approx((report["tasks"]["click"]["auc"] + report["tasks"]["buy"]["auc"]) / 2)


def test_log_and_pages_name_every_label(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    report = json.loads((run / "report.json").read_text())
    assert last["click_and_buy.auc"] == pytest.approx(report["tasks"]["click_and_buy"]["auc"], abs=1e-3)
    assert last["rows"] == 400 and last["buy.rows"] == report["tasks"]["buy"]["rows"]
    text = (run / "train.log").read_text()
    assert "click auc 0." in text and "click_and_buy auc 0." in text and "On test: click AUC 0." in text
    page = (run / "report.html").read_text()
    assert '<a href="tasks/click_and_buy/report.html">' in page
    assert "AUC" in (run / "tasks/buy/report.html").read_text()


def test_scores_of_rows_without_labels(run):
    scores = pq.read_table(run.parent / "scores", partitioning=None)
    assert scores.column_names == ["user", "prediction_click", "prediction_buy", "prediction_click_and_buy"]
    for name in ("click", "buy", "click_and_buy"):
        np.testing.assert_allclose(scores[f"prediction_{name}"], predicted(run, name)["prediction"], rtol=1e-5)


def test_comparisons_name_their_label(run, tmp_path):
    from tessera.ctr.data.errors import DataError
    from tessera.ctr.report.comparison import compare_runs

    found = compare_runs(run, run, tmp_path / "same", replicates=0, label="buy")
    assert found.values["first"]["auc"] == found.values["second"]["auc"]
    assert found.values["settings"]["label"] == "buy"
    with pytest.raises(DataError, match="has several labels; expected --label buy or click or click_and_buy, found"):
        compare_runs(run, run, tmp_path / "other", replicates=0)


def test_each_label_has_its_bands():
    usual = {"auc": 0.7, "logloss": 0.5, "normalized_entropy": 0.9, "calibration": 1.0}
    before = [{**usual, "tasks": {"click": usual, "buy": usual}}] * 3
    worse = {**usual, "auc": 0.5}
    day = {**usual, "tasks": {"click": usual, "buy": worse}}
    assert out_of_band(DailyBandsConfig(), before[0], before) is None
    assert out_of_band(DailyBandsConfig(), day, before).startswith("buy.auc is 0.5000, expected at least 0.6650")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.schema.labels=[click, {name: buy, where: clicks}]"], "data.schema.labels: 'buy': where is 'clicks'"),
        (
            ["trainer.early_stop.metric=bye.auc"],
            "trainer.early_stop.metric is 'bye.auc'; expected auc, .* buy.auc?",
        ),
        (
            ["data.schema.labels=[{name: click, loss: jrc}]", "data.schema.group=null"],
            "the loss of 'click' is jrc, which compares rows of a group; expected data.schema.group",
        ),
        (["data.schema.labels=[{name: price, loss: mse}]"], "metric is 'auc'; expected price.mse or price.mae"),
    ],
)
def test_settings_that_cannot_be_are_refused(data, tmp_path, overrides, line):
    with pytest.raises(ConfigError, match=line):
        load_config(options(data, tmp_path / "run", "mmoe", *overrides), "")
