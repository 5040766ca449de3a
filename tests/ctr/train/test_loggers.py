"""Loggers of a run: who gets the numbers, and that none of them can end or hold it."""

from __future__ import annotations

import json
import sys
import threading
import types
from pathlib import Path

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.runs import loggers
from tessera.ctr.runs.loggers import open_loggers
from tessera.ctr.train.trainer import Trainer
from tessera.embedding.errors import ConfigError
from tests.ctr.train.states import arguments, metrics_of, write_data


class FakeRun:
    """A run of the service, which keeps what it is told."""

    def __init__(self, module: types.SimpleNamespace, known: str | None) -> None:
        self.module, self.id, self.lines, self.finished = module, known or "an-id", [], False

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, values: dict[str, float]) -> None:
        if self.module.fails_at is not None and len(self.lines) >= self.module.fails_at:
            raise OSError("the network is away\nwith a second line")
        self.module.hangs.wait(30)
        self.lines.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package. fails_at: from which line on; hangs: clear it and it hangs."""
    module = types.ModuleType("wandb")
    module.runs, module.fails_at, module.hangs = [], None, threading.Event()
    module.hangs.set()
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.Settings = lambda **settings: settings

    def init(**given):
        run = FakeRun(module, given["id"])
        run.given = given
        module.runs.append(run)
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    yield module
    module.hangs.set()


def train(process, folder: Path, *more: str) -> Path:
    data = folder / "data"
    if not data.exists():
        write_data(data, 100, valid=20)
    keys = ["trainer.batch_size=20", "trainer.epochs=1", "trainer.resume=auto", *more]
    Trainer(load_config(arguments(data, folder / "run", *keys), ""), process).fit()
    return folder / "run"


def test_a_logger_gets_the_numbers_of_the_metrics_and_goes_on_with_its_run(process, wandb, tmp_path):
    run = train(process, tmp_path, "trainer.loggers=[wandb]")
    assert not (run / "tensorboard").exists()
    (first,) = wandb.runs
    assert first.finished and first.given["name"] == "run" and first.given["config"]["trainer.batch_size"] == "20"
    sent = {one["step"]: one["train/loss"] for one in first.lines if "train/loss" in one}
    assert sent == {line["step"]: line["loss"] for line in metrics_of(run) if line["kind"] == "train"}
    assert any("valid/auc" in one for one in first.lines)
    train(process, tmp_path, "trainer.loggers=[tensorboard,wandb]", "trainer.epochs=2")
    assert first.given["id"] is None and wandb.runs[1].given["id"] == "an-id"
    assert json.loads((run / "loggers.json").read_text()) == {"wandb": "an-id"}
    assert (run / "tensorboard").exists()


def test_a_logger_that_fails_costs_one_warning(process, wandb, tmp_path):
    wandb.fails_at = 1
    run = train(process, tmp_path, "trainer.loggers=[tensorboard,wandb]", "trainer.log_every=1")
    said = [line for line in (run / "train.log").read_text().splitlines() if "warning" in line]
    assert len(said) == 1
    assert said[0].endswith("trainer.loggers: wandb gets nothing more of this run: OSError: the network is away")
    assert (run / "report.json").exists() and len(wandb.runs[0].lines) == 1


@pytest.mark.parametrize("waiting", [2, 100], ids=["many wait", "few wait"])
def test_a_logger_that_hangs_holds_nothing(wandb, monkeypatch, tmp_path, waiting):
    monkeypatch.setattr(loggers, "WAITING", waiting)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.05)
    wandb.hangs.clear()
    warnings: list[str] = []
    (logger,) = open_loggers(["wandb"], tmp_path, {}, warnings.append, None)
    for step in range(10):
        logger.scalars({"train/loss": 0.5}, step)
    logger.close()
    (warning,) = warnings
    assert ("2 lines wait for it" if waiting == 2 else "did not take everything within") in warning


def test_a_package_that_is_missing_is_one_line_that_names_the_extra(process, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trainer.loggers has mlflow, .*: pip install tessera-ctr\[mlflow\]$"):
        train(process, tmp_path, "trainer.loggers=[mlflow]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ("[wand]", r"trainer.loggers has 'wand'; did you mean 'wandb'"),
        ("[mlflow,mlflow]", "trainer.loggers has mlflow twice"),
    ],
)
def test_a_logger_that_nobody_knows_is_refused(names, line):
    with pytest.raises(ConfigError, match=line):
        load_config([f"trainer.loggers={names}"], "")


def test_mlflow_has_what_was_logged(process, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is an extra, tessera-ctr[mlflow]")
    store = tmp_path / "store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "clicks")
    for epochs in (1, 2):
        run = train(process, tmp_path, "trainer.loggers=[mlflow]", f"trainer.epochs={epochs}")
    assert "warning: trainer.loggers" not in (run / "train.log").read_text()
    client = mlflow.MlflowClient(tracking_uri=store.as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("clicks").experiment_id])
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    assert found.data.params["trainer.batch_size"] == "20"
    logged = {one.step: one.value for one in client.get_metric_history(found.info.run_id, "train/loss")}
    expected = {line["step"]: line["loss"] for line in metrics_of(run) if line["kind"] == "train"}
    assert {step: logged[step] for step in expected} == pytest.approx(expected)


def test_wandb_takes_what_is_logged_offline(process, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an extra, tessera-ctr[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train(process, tmp_path, "trainer.loggers=[wandb]")
    assert "warning: trainer.loggers" not in (run / "train.log").read_text()
    (log,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in log.read_bytes()
