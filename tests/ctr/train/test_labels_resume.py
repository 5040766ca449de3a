"""A run over several labels, with unknown ones, spaces and a ranking loss, that stops and goes on ends as if it had
never stopped, also on other ranks."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.config import load_config
from tessera.ctr.train.trainer import Trainer
from tests.ctr.train.funnel import funnel_table, options
from tests.ctr.train.states import assert_same_end
from tests.ctr.train.warm_ranks import WarmRanks
from tests.ranks import on_ranks

ROWS, STEPS, STOP = 240, 10, 7  # of batches of 48, twice over the data
INT8 = ["embedding.format=int8", "embedding.alpt.every=2"]
LABELS = (
    "data.schema.labels=[click, {name: buy, where: click, weight: 2}, {name: like, loss: pairwise}, "
    "{name: price, loss: mse, weight: 0.1}]"
)
MODELS = {"mmoe": [LABELS, "model.dropout=0.2"], "esmm": []}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """With times of events: without, the clock of tables is the wall clock, and rows differ in when they were seen."""
    folder, draw = tmp_path_factory.mktemp("labels") / "data", np.random.default_rng(0)
    table = funnel_table(ROWS, 0)
    buy = pa.array(table["buy"].to_numpy(), mask=draw.random(ROWS) < 0.4)
    table = table.set_column(table.column_names.index("buy"), "buy", buy)
    more = {
        "like": pa.array((draw.random(ROWS) < 0.3).astype(np.int8), mask=draw.random(ROWS) < 0.2),
        "price": draw.normal(size=ROWS),
        "time": np.sort(draw.integers(0, 86400, ROWS)) + 20454 * 86400,
    }
    for name, column in more.items():
        table = table.append_column(name, pa.array(column))
    (folder / "train").mkdir(parents=True)
    pq.write_table(table, folder / "train" / "part-0.parquet", row_group_size=30)
    return folder


def job(data: Path, run_dir: Path, model: str, *more: str) -> list[str]:
    loop = ["data.valid=null", "data.test=null", "trainer.batch_size=48", "trainer.epochs=2", "trainer.resume=auto"]
    loop += ["data.schema.time=time", "data.lanes=6", "trainer.log_every=1", "trainer.checkpoint.every=50"]
    return options(data, run_dir, model, *loop, *MODELS[model], *more)


def fit(process, command: list[str]) -> None:
    Trainer(load_config(command, ""), process).fit()


def fit_whole_and_in_two(process, data: Path, folder: Path, model: str, more: list[str]) -> None:
    """Runs `whole`, `parts`, and `first`, which has the first part alone."""
    fit(process, job(data, folder / "whole", model, *more))
    fit(process, job(data, folder / "parts", model, *more, f"trainer.max_steps={STOP}"))
    shutil.copytree(folder / "parts", folder / "first")
    fit(process, job(data, folder / "parts", model, *more))


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


CASES = [
    ("mmoe", [], 2e-5),
    pytest.param("esmm", [], 2e-5, marks=pytest.mark.slow),
    pytest.param("mmoe", INT8, 1e-3, marks=pytest.mark.slow),
    pytest.param("mmoe", ["trainer.loss_divisor=task"], 2e-5, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "more", "rounding"), CASES)
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(data, tmp_path, model, more, rounding):
    """On one rank bit for bit, and from 1 to 2 ranks to rounding, as in test_resume.py."""
    on_ranks(1, fit_whole_and_in_two, data, tmp_path, model, more)
    assert len(losses(tmp_path / "whole")) == STEPS
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    on_ranks(2, fit, job(data, tmp_path / "first", model, *more))
    assert losses(tmp_path / "first")[:STOP] == losses(tmp_path / "whole")[:STOP]
    np.testing.assert_allclose(losses(tmp_path / "first"), losses(tmp_path / "whole"), rtol=rounding)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_run_that_is_killed_and_goes_on_has_the_same_curve(data, tmp_path, model):
    ranks, output = WarmRanks(), tmp_path / "output"
    names = ("whole", "killed", "more", "fewer")
    whole, killed, more, fewer = (job(data, tmp_path / name, model, "trainer.checkpoint.every=3") for name in names)
    try:
        for world, command, end in (
            (2, whole, None),
            (2, killed, (STOP, signal.SIGKILL, [0, 1])),
            (2, killed, None),
            (1, more, (STOP, signal.SIGKILL, [0])),
            (2, more, None),
            (2, fewer, (STOP, signal.SIGKILL, [0, 1])),
            (1, fewer, None),
        ):
            expected = [-signal.SIGKILL if end else 0] * world
            assert ranks.run(world, command, output, end=end) == expected, output.read_text()
    finally:
        ranks.close()
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    for name in ("more", "fewer"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "whole"), rtol=2e-5, err_msg=name)
