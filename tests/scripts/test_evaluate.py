"""Scoring a run again by the command, as its help says, whatever kind of run it is and however far it came."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tessera.ctr.metrics import exact
from tests.ctr.daily.days import command, key_of, write_days
from tests.ctr.train.states import arguments, newest, write_data
from tests.ranks import run_script

VALID = 150


def script(name: str, *options: str) -> str:
    done = run_script(f"scripts/{name}.py", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of one epoch; beside it its data and other data."""
    folder = tmp_path_factory.mktemp("run")
    write_data(folder / "data", 300, VALID)
    write_data(folder / "new", 40, 70, seed=3)
    script("train", *arguments(folder / "data", folder / "run", "trainer.batch_size=50", "trainer.eval_every=4"))
    return folder


def scored(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    tables = [pq.read_table(path) for path in sorted((folder / "predictions").glob("*.parquet"))]
    found = {name: np.concatenate([one[name].to_numpy() for one in tables]) for name in ("row", "prediction", "label")}
    return json.loads((folder / "report.json").read_text()), found


@pytest.mark.parametrize(
    "order",
    [
        ["RUN", "--split", "valid", "NEW", "--output", "OUT"],
        ["RUN", "NEW", "--output", "OUT", "trainer.batch_size=30", "--split", "valid"],
        ["--split", "valid", "--output", "OUT", "RUN", "--slice", "c", "NEW", "--slice", "new_ids", "data.threads=1"],
        ["--output=OUT", "--split=valid", "RUN", "NEW"],
    ],
)
def test_options_and_overrides_in_any_order(run, tmp_path, order):
    places = {"RUN": str(run / "run"), "NEW": f"data.path={run / 'new'}", "OUT": str(tmp_path / "out")}
    options = [places.get(one, one.replace("=OUT", f"={tmp_path / 'out'}")) for one in order]
    script("evaluate", *options)
    report, found = scored(tmp_path / "out")
    assert report["split"] == "valid" and report["rows"] == 70 == len(np.unique(found["row"]))
    assert ("slices" in report) == ("--slice" in order)


def test_the_best_model_is_scored_and_named(run, tmp_path):
    said = script("evaluate", str(run / "run"), "--split", "valid", "--output", str(tmp_path / "out"))
    report, found = scored(tmp_path / "out")
    first, before = scored(run / "run")
    assert report["step"] == first["step"] and f"by the model of step {first['step']}." in said
    np.testing.assert_allclose(
        found["prediction"][np.argsort(found["row"])], before["prediction"][np.argsort(before["row"])]
    )
    for name in ("auc", "logloss", "calibration", "observed_rate"):
        assert report[name] == pytest.approx(first[name], rel=1e-6)


def test_a_run_without_a_best_model_is_scored_by_its_newest_state(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run / "run", folder)
    shutil.rmtree(folder / "best")
    script("evaluate", str(folder), "--split", "valid", "--output", str(tmp_path / "out"))
    report, found = scored(tmp_path / "out")
    assert newest(folder).name == f"step-{report['step']:010d}" or str(report["step"]) in newest(folder).name
    assert report["auc"] == exact.auc(found["prediction"], found["label"])
    shutil.rmtree(folder / "checkpoints")
    done = run_script("scripts/evaluate.py", str(folder), "--split", "valid")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "holds no best model" in done.stderr and "train the run first" in done.stderr


@pytest.mark.slow
def test_a_run_over_days_is_scored_as_its_next_day_scores_it(tmp_path):
    data, folder = write_days(tmp_path / "data", 3), tmp_path / "run"
    script("daily", *command(data, folder, f"daily.to={key_of(1)}"))
    day = f"data.test=day={key_of(2)}"
    script("evaluate", str(folder), day, "--output", str(tmp_path / "out"), "--slice", "new_ids")
    report, found = scored(tmp_path / "out")
    assert report["rows"] == 300
    script("daily", *command(data, folder, f"daily.to={key_of(2)}"))
    tables = [pq.read_table(path) for path in (folder / "days" / key_of(2) / "predictions").glob("*.parquet")]
    progressive = {one: np.concatenate([table[one].to_numpy() for table in tables]) for one in ("row", "prediction")}
    order = np.argsort(progressive["row"])
    np.testing.assert_array_equal(found["prediction"][np.argsort(found["row"])], progressive["prediction"][order])
