"""The search for learning rates: what a curve suggests, what it refuses, and that it saves nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tessera.ctr.config_types import Config
from tessera.ctr.report.find_lr_page import sentence, write_rates
from tessera.ctr.train.find_lr import check, curve_of, largest_factor, smoothed
from tessera.embedding.errors import ConfigError
from tests.ctr.report.html_page import Page


def curve(loss: np.ndarray, ended: str = ""):
    still = np.linspace(0.2, 0.1, len(loss))  # what the other side learns
    return curve_of("rows", 0.05, np.geomspace(1e-4, 10, len(loss)), loss + still, still, ended)


def test_the_steepest_fall_is_suggested():
    place = np.log10(np.geomspace(1e-4, 10, 200))
    found = curve(0.7 - 0.3 / (1 + np.exp(-4 * (place + 2))) + 5 * np.maximum(0, place - 0.3) ** 2)
    assert 1e-2 < found.suggested < 5e-2, "behind the fall at 0.01, by as much as smoothing lags"
    assert 0.5 < found.least < 5


def test_nothing_is_suggested_where_the_loss_rises_or_steps_are_few():
    assert curve(np.linspace(0.6, 0.9, 50)).suggested is None
    found = curve(np.array([0.7, 0.6, np.inf]), "the loss of step 2 is inf")
    assert found.suggested is None and len(found.rate) == 2
    assert sentence(found).endswith("did not fall in 2 steps (the loss of step 2 is inf), nothing is suggested.")


def test_smoothing_has_no_bias_at_its_beginning():
    assert smoothed(np.full(30, 0.5)) == pytest.approx(np.full(30, 0.5), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((5, 0.1, 1), "--steps is 5; expected 20 or more"),
        ((50, 1, 0.1), "--low is 1 and --high is 0.1; expected low below high"),
        ((50, 0, 1), "expected low below high, and more than 0"),
    ],
)
def test_arguments_that_are_none(arguments, said):
    with pytest.raises(ConfigError, match=said):
        check(Config(), *arguments)


def test_rates_of_rows_end_below_one_over_decay():
    config = Config()
    assert largest_factor(config, "rows") == np.inf
    config.optimizer.sparse.decay = 0.2
    config.embedding.tables = {"a": {"lr": 0.5, "decay": 0.1}, "b": {"decay": 0.0}}
    assert largest_factor(config, "rows") == pytest.approx(20), "table a: 0.5 x 0.1"
    assert largest_factor(config, "dense") == np.inf
    check(config, 200, 0.001, 1000)
    with pytest.raises(ConfigError, match="fewer than 20 rates are below 1 / decay, 20 times the configured one"):
        check(config, 40, 1, 1000)


def test_a_run_that_begins_with_another_model_is_refused():
    config = Config()
    config.trainer.warm_start.path = "runs/a"
    with pytest.raises(ConfigError, match="trainer.warm_start.path is set; expected null"):
        check(config, 50, 0.1, 1)


def test_the_page_asks_no_network(tmp_path):
    write_rates(tmp_path, [curve(np.linspace(0.9, 0.6, 50)), curve(np.array([0.5]))])
    page = Page((tmp_path / "report.html").read_text())
    assert not page.fetched
    told = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert told["key"] == "optimizer.sparse.lr" and told["suggested"] is None


@pytest.mark.slow
def test_a_search_writes_curves_and_touches_no_run(tmp_path, capsys):
    from tests.ctr.train.funnel import options, write_funnel
    from tests.ranks import on_ranks

    data, run = write_funnel(tmp_path / "data"), tmp_path / "run"
    run.mkdir()
    (run / "mine").write_text("kept")
    found = [on_ranks(ranks, search, options(data, run)) for ranks in (1, 2)]
    for one in (*found[0], *found[1]):
        assert [curve.key for curve in one] == ["optimizer.dense.lr", "optimizer.sparse.lr"]
    for ours, theirs in zip(found[0][0], found[1][1], strict=True):
        assert len(ours.rate) == len(theirs.rate) >= 20
        assert np.allclose(ours.loss[:20], theirs.loss[:20], atol=1e-4)
        assert ours.loss[0] == pytest.approx(ours.still[0]), "the same first batch and weights"
        assert np.abs(ours.loss - ours.still).max() > 0.01, ours.key
    assert [path.name for path in run.iterdir()] == ["mine"]


def search(process, overrides: list[str]):
    from tessera.ctr.config import load_config
    from tessera.ctr.train.find_lr import find_rates

    return find_rates(load_config(overrides, ""), process, 40, 0.01, 100)
