"""A run from parquet to report, as users start it: with torchrun on 1 and 2 ranks, and what the folder then holds.

That torch's launcher starts new interpreters just as well is what the slow tests of test_resume_torchrun.py find.
"""

import json
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.report.comparison import compare_runs
from tests.ranks import run_script, warm_torchrun

SMALL = [
    "data=synthetic",
    "model.hidden=[16]",
    "model.embedding_dim=4",
    "embedding.rows=500",
    "trainer.batch_size=250",
    "trainer.log_every=1",
    "trainer.eval_every=4",
    "trainer.device=cpu",
]
COUNTS = [f"{{name: I{i}, kind: numeric, transform: log1p, missing: 0.0}}" for i in (1, 2, 5)]
#: Of the 39 columns; test_training_learns has all of them.
FEW = f"data.schema.features=[{', '.join([*COUNTS, *(f'{{name: C{i}}}' for i in (2, 6, 8, 9, 14, 17, 20, 23))])}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(SyntheticConfig(rows=3000), folder)
    return folder


def train(run_dir: Path, data: Path, *overrides: str, world: int = 1) -> subprocess.CompletedProcess:
    arguments = ["scripts/train.py", *SMALL, f"data.path={data}", f"trainer.run_dir={run_dir}", *overrides]
    return warm_torchrun(world, *arguments, timeout=180) if world == 2 else run_script(*arguments, world=world)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data) -> dict[int, Path]:
    """Finished runs of the same configuration: number of ranks -> folder. 3 ranks do not divide the 16 lanes."""
    folders = {}
    for world in (1, 2, 3):
        folders[world] = tmp_path_factory.mktemp("runs") / "run"
        done = train(folders[world], data, FEW, world=world)
        assert done.returncode == 0, done.stderr
    return folders


def lines(run_dir: Path, kind: str) -> list[dict]:
    parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in parsed if line["kind"] == kind]


def test_the_folder_holds_all_that_a_run_promises(runs):
    folder = runs[2]
    for name in ("config.yaml", "versions.json", "plan.txt", "train.log", "metrics.jsonl", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "tensorboard").iterdir())
    report = json.loads((folder / "report.json").read_text())
    for key in ("auc", "logloss", "gauc", "normalized_entropy", "calibration", "pr_auc", "rows", "positives"):
        assert key in report
    assert report["rows"] == 300
    assert report["ceiling"]["auc"] > 0.7
    predictions = [pq.read_table(path) for path in sorted((folder / "predictions").glob("test-*.parquet"))]
    assert len(predictions) == 2
    assert sum(table.num_rows for table in predictions) == 300


@pytest.mark.parametrize("world", [2, 3])
def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(runs, world):
    one, many = lines(runs[1], "train"), lines(runs[world], "train")
    assert len(one) == len(many) == 10  # 2,400 rows in batches of 250, the last one short
    assert [line["rows"] for line in one] == [line["rows"] for line in many] == [250] * 9 + [150]
    assert [line["loss"] for line in many] == pytest.approx([line["loss"] for line in one], rel=2e-5)
    aucs = [line["auc"] for line in lines(runs[world], "eval")]
    assert aucs == pytest.approx([line["auc"] for line in lines(runs[1], "eval")], abs=1e-4)


def test_a_run_is_scored_again_on_another_number_of_ranks(runs, data, tmp_path):
    output = tmp_path / "scores"
    slices = ["--slice", "C2", "--slice", "new_ids"]
    done = run_script("scripts/evaluate.py", str(runs[3]), "--split", "test", "--output", str(output), *slices, world=2)
    assert done.returncode == 0, done.stderr
    again, first = (json.loads((folder / "report.json").read_text()) for folder in (output, runs[3]))
    assert again["rows"] == first["rows"]
    assert again["auc"] == pytest.approx(first["auc"], abs=1e-6)
    assert again["logloss"] == pytest.approx(first["logloss"], rel=1e-6)
    # Row by row, although three ranks wrote what two ranks wrote here; and against a run on one rank.
    same = compare_runs(runs[3], output, tmp_path / "same", replicates=10).values
    assert same["first"]["rows"] == 300 and abs(same["differences"]["logloss"]["closed_form"]["high"]) < 1e-6
    other = compare_runs(runs[1], output, tmp_path / "other", split="test", replicates=10).values
    assert abs(other["differences"]["auc"]["difference"]) < 1e-3
    slices = again["slices"]["C2"]["slices"]
    assert sum(one["rows"] for one in slices) == 300 and len(slices) > 1
    new = {one["value"]: one["rows"] for one in again["slices"]["new ids"]["slices"]}
    assert new == {"all ids known": 300 - (rows := rows_with_new_ids(runs[3] / "best", data)), "with new ids": rows}
    assert 0 < rows < 300


def rows_with_new_ids(best: Path, data: Path) -> int:
    """Of the test split: rows with an id that is not in the saved rows of its column's table."""
    columns, new = pq.read_table(data / "test").to_pydict(), set()
    for column in (path.name for path in (best / "rows").iterdir()):
        known = set(pq.read_table(best / "rows" / column, columns=["id"])["id"].to_pylist())
        new |= {row for row, one in enumerate(columns[column]) if one is not None and one not in known}
    return len(new)


def test_training_learns(tmp_path, data):
    done = train(
        tmp_path / "run",
        data,
        "trainer.epochs=2",
        "trainer.eval_every=null",
        "optimizer.sparse.name=rowwise_adagrad",
        "optimizer.sparse.lr=0.02",
    )
    assert done.returncode == 0, done.stderr
    aucs = [line["auc"] for line in lines(tmp_path / "run", "eval")]
    assert max(aucs) > 0.6


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_the_best_model_is_scored(tmp_path, data):
    folder = tmp_path / "run"
    stop = [
        "trainer.epochs=50",
        "trainer.early_stop.patience=2",
        "optimizer.sparse.name=rowwise_adagrad",
        "optimizer.sparse.lr=0.3",
        "optimizer.dense.lr=0.02",
    ]
    done = train(folder, data, *stop)
    assert done.returncode == 0, done.stderr
    during, (valid, _test) = lines(folder, "eval")[:-2], lines(folder, "eval")[-2:]
    aucs = [line["auc"] for line in during]
    best = aucs.index(max(aucs))
    assert len(aucs) == best + 3  # two evaluations without a new best
    assert valid["auc"] == pytest.approx(aucs[best], abs=1e-6)


@pytest.mark.slow
def test_learned_scales_on_one_and_two_ranks(tmp_path, data):
    """int8 rows with ALPT's second pass on every other step; rows rounded alike but for sums in another order."""
    options = ["embedding.format=int8", "embedding.alpt.every=2", "embedding.init_std=0.05", "embedding.range=0.5"]
    losses = []
    for world in (1, 2):
        done = train(tmp_path / str(world), data, *options, world=world)
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in lines(tmp_path / str(world), "train")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_amp_and_warm_up_and_limits_run(tmp_path, data):
    options = [
        "trainer.amp=true",
        "optimizer.dense.warmup_steps=5",
        "optimizer.sparse.warmup_steps=4",
        "trainer.max_steps=6",
    ]
    done = train(tmp_path / "run", data, *options)
    assert done.returncode == 0, done.stderr
    steps = lines(tmp_path / "run", "train")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    # The rate shown is the one of the next step.
    assert [line["sparse_lr"] for line in steps] == pytest.approx([0.025, 0.0375, 0.05, 0.05, 0.05, 0.05])
    assert steps[0]["dense_lr"] == pytest.approx(0.001 * 2 / 5)
