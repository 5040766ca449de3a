"""What a run tells at its end: of all its steps, of the model that it scored, and of no row twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tessera.ctr.metrics import exact
from tessera.ctr.report.comparison import compare_runs
from tests.ctr.train.states import arguments, metrics_of, write_data
from tests.ctr.train.test_resume import trained

ROWS, VALID = 1500, 230


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", ROWS, VALID)


def job(data: Path, run_dir: Path, *more: str) -> list[str]:
    return arguments(data, run_dir, "trainer.batch_size=100", "trainer.resume=auto", *more)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def predictions(folder: Path) -> dict[str, np.ndarray]:
    tables = [pq.read_table(path) for path in sorted((folder / "predictions").glob("*.parquet"))]
    return {name: np.concatenate([one[name].to_numpy() for one in tables]) for name in ("row", "prediction", "label")}


def lines(folder: Path, kind: str) -> list[dict]:
    return [line for line in metrics_of(folder) if line["kind"] == kind]


def test_a_run_that_goes_on_with_other_ranks_scores_each_row_once(ranks, data, tmp_path):
    folder = tmp_path / "run"
    for world, epochs in ((3, 1), (1, 2), (2, 3)):
        trained(ranks, world, job(data, folder, f"trainer.epochs={epochs}"), tmp_path)
        assert len(list((folder / "predictions").iterdir())) == world
        found, report = predictions(folder), report_of(folder)
        assert sorted(found["row"]) == list(range(VALID)) and report["rows"] == VALID
        assert report["auc"] == exact.auc(found["prediction"], found["label"])
        last = lines(folder, "eval")[-1]
        assert report["auc"] == pytest.approx(last["auc"], abs=last["auc_error_bound"] + 1e-9)
        assert not [path.name for path in folder.iterdir() if path.name.endswith("-result")]


@pytest.mark.parametrize(
    ("log_every", "steps"), [pytest.param(1000, [15], marks=pytest.mark.slow), (4, [4, 8, 12, 15]), (5, [5, 10, 15])]
)
def test_the_last_steps_are_logged(ranks, data, tmp_path, log_every, steps):
    folder = tmp_path / "run"
    output = trained(ranks, 2, job(data, folder, f"trainer.log_every={log_every}"), tmp_path)
    assert (
        [line["step"] for line in lines(folder, "train")] == steps == [one["step"] for one in lines(folder, "tables")]
    )
    assert sum(line["rows"] for line in lines(folder, "train")) == ROWS
    assert "step 15 · loss 0." in output
    report, page = report_of(folder), (folder / "report.html").read_text()
    assert report["tables"]["total"]["rows"] > 0 and report["plots"]["loss"]["training"]["step"] == steps
    assert "Trained on 1,500 rows in 15 steps" in page
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [one.step for one in events.Scalars("train/loss")] == steps
    assert "tables/row/rows" in events.Tags()["scalars"]


def test_the_last_steps_are_logged_once_by_a_run_that_goes_on(ranks, data, tmp_path):
    """And a finished run that is started again tells the same."""
    folder = tmp_path / "run"
    for epochs in (1, 1, 2):
        trained(ranks, 1, job(data, folder, "trainer.log_every=4", f"trainer.epochs={epochs}"), tmp_path)
        assert sum(line["rows"] for line in lines(folder, "train")) == ROWS * epochs
        assert lines(folder, "train")[-1]["step"] == 15 * epochs
        assert lines(folder, "train")[-1]["epoch"] == epochs - 1


def test_what_the_best_model_scores_stands_at_its_step(ranks, data, tmp_path):
    folder = tmp_path / "run"
    wild = [
        "optimizer.sparse.name=rowwise_adagrad",
        "optimizer.sparse.lr=0.5",
        "optimizer.dense.lr=0.1",
        "trainer.epochs=3",
        "trainer.eval_every=3",
    ]
    output = trained(ranks, 1, job(data, folder, *wild, "data.test=valid"), tmp_path)
    *during, valid, test = lines(folder, "eval")
    best = max(during, key=lambda line: line["auc"])["step"]
    assert best < 45 and valid["step"] == test["step"] == report_of(folder)["step"] == best
    assert report_of(folder)["plots"]["auc"]["test"]["step"] == [best]
    assert f"best model, of step {best} · valid · auc" in output and f"best model, of step {best} · test" in output
    assert f"rows of test, by the model of step {best}." in output
    values = report_of(folder)["plots"]["auc"]["valid"]
    assert values["step"] == [line["step"] for line in during]  # the second time adds no point


def test_nothing_to_score_is_a_run_all_the_same(ranks, data, tmp_path):
    folder = tmp_path / "run"
    output = trained(ranks, 2, job(data, folder, "data.valid=null", "trainer.log_every=100"), tmp_path)
    assert "nothing was scored: data.valid and data.test are null" in output
    report, page = report_of(folder), (folder / "report.html").read_text()
    assert report["split"] is None and report["tables"]["total"]["rows"] > 0 and "loss" in report["plots"]
    assert "Nothing was scored" in page and "Trained on 1,500 rows in 15 steps" in page and "Quality on" not in page
    # With a split to score it goes on, and without one again: nothing of the split stays.
    trained(ranks, 1, job(data, folder, "trainer.epochs=2"), tmp_path)
    assert report_of(folder)["rows"] == VALID
    trained(ranks, 1, job(data, folder, "data.valid=null", "trainer.epochs=3"), tmp_path)
    assert report_of(folder)["split"] is None and not (folder / "predictions").exists()


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_split_without_rows_is_undefined(ranks, data, tmp_path, world):
    """All its rows are bad ones, and these are passed over."""
    (tmp_path / "none").mkdir()
    table = pq.read_table(data / "valid")
    table = table.set_column(0, "label", pa.array(np.full(VALID, 7, np.int8)))
    pq.write_table(table, tmp_path / "none" / "part.parquet")
    folder = tmp_path / "run"
    output = trained(ranks, world, job(data, folder, f"data.test={tmp_path / 'none'}", "data.bad_rows=skip"), tmp_path)
    assert "test · auc undefined · logloss undefined · normalized_entropy undefined · calibration undefined" in output
    report = report_of(folder)
    assert (report["split"], report["rows"], report["auc"], report["logloss"]) == ("test", 0, None, None)
    assert report["splits"]["valid"]["rows"] == VALID
    assert "AUC undefined and logloss undefined on 0 rows of test" in output


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_model_scored_on_any_number_of_ranks_gives_the_same_numbers(ranks, tmp_path, world):
    """Calibration, which shifts first where two models differ, to as many digits as AUC and logloss; with weights."""
    data = write_data(tmp_path / "data", 400, VALID)
    weights = pa.array(10.0 ** np.random.default_rng(5).uniform(-3, 3, VALID).astype(np.float32), pa.float32())
    for split in ("train", "valid"):
        table = pq.read_table(data / split)
        column = weights.take(pa.array(np.arange(table.num_rows) % VALID))
        pq.write_table(table.append_column("w", column), data / split / "part.parquet", row_group_size=20)
    base = tmp_path / "1"
    weighted = ["data.schema.weight=w", "trainer.log_every=100"]
    trained(ranks, 1, job(data, base, *weighted), tmp_path)
    expected = lines(base, "eval")[-1]
    found = predictions(base)
    folder = tmp_path / str(world)
    again = ["trainer.resume=" + str(max((base / "checkpoints").glob("step-*"))), *weighted]
    trained(ranks, world, [*job(data, folder)[:-1], *again], tmp_path)
    last = lines(folder, "eval")[-1]
    for name in ("auc", "logloss", "normalized_entropy", "calibration"):
        assert last[name] == pytest.approx(expected[name], rel=1e-6), name
        assert report_of(folder)[name] == pytest.approx(report_of(base)[name], rel=1e-6), name
    other = predictions(folder)
    order, places = np.argsort(found["row"]), np.argsort(other["row"])
    np.testing.assert_allclose(other["prediction"][places], found["prediction"][order], rtol=1e-5)
    same = compare_runs(base, folder, tmp_path / "compared", "valid", replicates=0).values
    assert same["first"]["rows"] == VALID
