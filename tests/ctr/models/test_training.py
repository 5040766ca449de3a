"""Every model trains from parquet: the loss falls, the best is restored; one of them on two ranks like on one."""

import json
from pathlib import Path

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.synthetic import write_synthetic
from tessera.ctr.data.synthetic_rows import SyntheticConfig
from tessera.ctr.train.trainer import Trainer
from tessera.distributed.rank import Process
from tests.ctr.models.names import HIDDEN
from tests.ctr.models.names import OF_ONE_LABEL as MODELS
from tests.ranks import on_ranks

QUICK = ["autoint_plus", "fgcnn"]  # the others by -m slow
COLUMNS = [f"{{name: I{i}, kind: numeric, transform: log1p, missing: 0.0}}" for i in (1, 5)]
COLUMNS += [f"{{name: C{i}}}" for i in (2, 6, 9, 14, 17, 23)]
FEW = f"data.schema.features=[{', '.join(COLUMNS)}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(SyntheticConfig(rows=2000), folder)
    return folder


def options(model: str, data: Path, run_dir: Path, *more: str) -> list[str]:
    small = [f"model.{key}=[16]" for key in HIDDEN.get(model, ["hidden"])]
    if model != "lr":
        small.append("model.embedding_dim=4")
    return [
        *("data=synthetic", f"data.path={data}", f"trainer.run_dir={run_dir}", f"model={model}", *small),
        *(
            "embedding.rows=500",
            "optimizer.sparse.name=rowwise_adagrad",
            "optimizer.sparse.lr=0.05",
            "optimizer.dense.lr=0.01",
            "trainer.batch_size=250",
        ),
        *("trainer.epochs=4", "trainer.log_every=1", "trainer.device=cpu", "trainer.threads=1", *more),
    ]


def train(process: Process, overrides: list[str]) -> None:
    Trainer(load_config(overrides, ""), process).fit()


def train_all(process: Process, jobs: list[list[str]]) -> None:
    for overrides in jobs:
        train(process, overrides)


def lines(run_dir: Path, kind: str) -> list[dict]:
    parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in parsed if line["kind"] == kind]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """A folder with one finished run per quick model, all in one process, of few columns: the slow ones have all."""
    folder = tmp_path_factory.mktemp("runs")
    on_ranks(1, train_all, [options(model, data, folder / model, FEW) for model in QUICK])
    return folder


@pytest.mark.parametrize("model", QUICK)
def test_the_loss_falls_and_the_report_is_written(runs, model):
    check(runs, model)


@pytest.mark.slow
@pytest.mark.parametrize("model", [model for model in MODELS if model not in QUICK])
def test_the_loss_of_other_models_falls(data, tmp_path, model):
    on_ranks(1, train, options(model, data, tmp_path / model))
    check(tmp_path, model)


def check(runs: Path, model: str) -> None:
    losses = [line["loss"] for line in lines(runs / model, "train")]
    assert sum(losses[-6:]) < sum(losses[:6]) - 0.02 * 6
    assert json.loads((runs / model / "report.json").read_text())["rows"] == 200


@pytest.mark.slow
def test_two_ranks_train_fgcnn_as_one_does(runs, data, tmp_path):
    on_ranks(2, train, options("fgcnn", data, tmp_path / "run", FEW))
    one, two = (lines(folder, "train") for folder in (runs / "fgcnn", tmp_path / "run"))
    assert [line["loss"] for line in two][:10] == pytest.approx([line["loss"] for line in one][:10], rel=1e-4)


@pytest.mark.slow
def test_ids_alone_train(data, tmp_path):
    ids_alone = "data.schema.features=[" + ", ".join(f"{{name: C{i}}}" for i in range(1, 8)) + "]"
    models = ["deepfm", "fgcnn", "lr", "pin"]
    more = [ids_alone, "trainer.max_steps=2"]
    on_ranks(1, train_all, [options(model, data, tmp_path / model, *more) for model in models])
    for model in models:
        assert (tmp_path / model / "report.json").exists()


@pytest.mark.slow
def test_a_plateau_lowers_both_rates(data, tmp_path):
    plateau = ["optimizer.plateau.factor=0.1", "optimizer.plateau.floor=0.0002", "trainer.eval_every=1"]
    on_ranks(1, train, options("dnn", data, tmp_path / "run", *plateau, "trainer.max_steps=30"))
    steps = lines(tmp_path / "run", "train")
    evaluations = lines(tmp_path / "run", "eval")[: len(steps)]
    best, factor = None, 1.0
    # The rate of a train line is the one of the next step, before that step's evaluation.
    for step, evaluation in zip(steps, evaluations, strict=False):
        assert step["sparse_lr"] == pytest.approx(max(0.05 * factor, 0.0002))
        assert step["dense_lr"] == pytest.approx(max(0.01 * factor, 0.0002))
        if best is None or evaluation["auc"] > best:
            best = evaluation["auc"]
        else:
            factor *= 0.1
    assert factor < 1
