"""Training on part of the negatives gives predictions of all rows."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.config import load_config
from tessera.ctr.data.batch import Batch
from tessera.ctr.data.labels import labels_of
from tessera.ctr.models.tower import Tower
from tessera.ctr.serving import Scorer
from tessera.ctr.train.task_loss import TaskLoss
from tessera.ctr.train.trainer import Trainer
from tessera.embedding.errors import ConfigError
from tests.ctr.export.models import export

TEACHER = ("trainer.distil.kind=batch", "trainer.distil.teacher=runs/a")


def test_the_loss_of_the_sample_is_least_at_the_logit_of_all_rows():
    """1,000 positives and 9,000 negatives, of which a tenth is read: the odds of all rows are 1 to 9."""
    labels = torch.cat([torch.ones(1000, 1), torch.zeros(900, 1)])
    batch = Batch(None, None, labels, torch.ones(1900), None, None, 1900)
    logit = torch.full((1900,), math.log(1 / 9), dtype=torch.float64, requires_grad=True)
    batch.labels, batch.weight = batch.labels.double(), batch.weight.double()
    TaskLoss(labels_of(["label"]), Tower(), negative_rate=0.1)(logit, batch, 1900).backward()
    assert logit.grad.sum().abs() < 1e-9
    whole = TaskLoss(labels_of(["label"]), Tower())(logit, batch, 1900)
    assert whole.item() > TaskLoss(labels_of(["label"]), Tower(), negative_rate=0.1)(logit, batch, 1900).item()


@pytest.mark.parametrize(
    "overrides, words",
    [
        pytest.param(["data.negative_rate=0"], ["data.negative_rate", "0"], marks=pytest.mark.slow),
        (["data.negative_rate=1.5"], ["data.negative_rate is 1.5", "at most 1"]),
        (["data.negative_rate=.5", "data.schema.labels=[{name: label, loss: focal}]"], ["label (focal)", "plain"]),
        (
            ["data.negative_rate=.5", "trainer.distil.kind=batch", "trainer.distil.teacher=runs/a"],
            ["teacher", "distil.kind=none"],
        ),
    ],
)
def test_a_mistake_is_one_line(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config(["data=synthetic", *overrides], "")
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def rows_of(draw: np.random.Generator, count: int) -> dict:
    x, c = draw.normal(size=count), draw.integers(0, 20, count)
    logit = x + np.linspace(-1, 1, 20)[c] - 2.5
    return {"label": (draw.random(count) < 1 / (1 + np.exp(-logit))).astype(np.float32), "x": x, "c": c}


@pytest.mark.slow
def test_reports_are_calibrated_as_without(process, tmp_path):
    draw = np.random.default_rng(0)
    for split, count in (("train", 40_000), ("valid", 20_000), ("test", 20_000)):
        (tmp_path / split).mkdir()
        pq.write_table(pa.table(rows_of(draw, count)), tmp_path / split / "part.parquet", row_group_size=4000)
    reports = {}
    for rate in (1.0, 0.2):
        overrides = [
            *("data=synthetic", f"data.path={tmp_path}", "data.schema.time=null", "model=lr"),
            "data.schema.features=[{name: x, kind: numeric}, {name: c}]",
            *("numeric=raw", f"data.negative_rate={rate}", f"trainer.run_dir={tmp_path}/run{rate:g}"),
            *("trainer.epochs=3", "trainer.batch_size=500", "trainer.device=cpu", "trainer.threads=1"),
            *(
                "optimizer.dense.lr=0.02",
                "optimizer.sparse.name=rowwise_adagrad",
                "optimizer.sparse.lr=0.05",
                "embedding.rows=400",
            ),
        ]
        Trainer(load_config(overrides, ""), process).fit()
        reports[rate] = json.loads((tmp_path / f"run{rate:g}" / "report.json").read_text())
    whole, sampled = (reports[rate]["splits"]["test"] for rate in (1.0, 0.2))
    assert whole["calibration"] == pytest.approx(1, abs=0.05) and sampled["calibration"] == pytest.approx(1, abs=0.05)
    assert sampled["logloss"] == pytest.approx(whole["logloss"], abs=0.003)
    (tmp_path / "run").symlink_to(tmp_path / "run0.2")
    exported = export(process, tmp_path)
    assert exported.difference < 1e-6
    rows = pq.read_table(tmp_path / "test" / "part.parquet")
    scores = Scorer.load(tmp_path / "export")(rows.select(["x", "c"]))
    assert scores.mean() == pytest.approx(rows["label"].to_numpy().mean(), rel=0.05)
