"""Runs whose tables differ in dim, optimizer, format and the life of their rows: what is saved, loaded and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.ctr.config import load_config
from tessera.ctr.data.schema import Schema
from tessera.ctr.network import build_model
from tessera.ctr.train.optimizers import Optimizers
from tests.ctr.train.states import arguments, newest, rows_of_state, tensors_of_state, write_data
from tests.ranks import run_script

OWN = [
    "optimizer=adam_adagrad",
    "embedding.oov=learned",
    "embedding.tables.row={dim: 2, optimizer: adam, lr: 0.01}",
    "embedding.tables.c={format: int8, lr: 0.2}",
    "embedding.tables.d={dim: 3, optimizer: ftrl}",
]
STEPS = ["trainer.batch_size=100", "trainer.max_steps=8", "model.dropout=0.0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", 1000)


@pytest.fixture(scope="module")
def run(ranks, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    command = arguments(data, folder / "run", *STEPS, *OWN)
    assert ranks.run(2, command, folder / "output") == [0, 0], (folder / "output").read_text()
    return folder / "run"


def script(name: str, *words: object, status: int = 0) -> str:
    done = run_script(f"scripts/{name}.py", *map(str, words))
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_state_says_what_each_table_is(run):
    said = script("inspect_checkpoint", run)
    assert "table row: 800 rows, adam; " in said and ", ftrl; " in said and ", rowwise_adagrad; " in said
    assert "values [3]float32" in said and "values [4]float32" in said and "values [8]uint8" in said
    assert "tables/projections.row_v.weight [2, 4] float32" in said
    assert "tables/projections.d_v.weight [3, 4] float32" in said and "projections.c_v" not in said
    plan = {line.split()[0]: line.split()[2] for line in (run / "plan.txt").read_text().splitlines() if "  " in line}
    assert (plan["row"], plan["c"], plan["d"]) == ("3", "5", "4")


def test_the_model_that_is_loaded_is_the_one_that_was_trained(run, data):
    """With 1 rank instead of 2."""
    script("evaluate", run, "--output", run / "evaluations" / "again", "--split", "valid")
    found = json.loads((run / "evaluations" / "again" / "report.json").read_text())
    trained = json.loads((run / "report.json").read_text())
    assert found["logloss"] == pytest.approx(trained["logloss"], rel=1e-5)


def test_a_conversion_leaves_other_tables_alone(run, tmp_path):
    said = script("convert_tables", run, tmp_path / "converted", "tables.row.format=bf16", "tables.c.format=fp32")
    errors = {
        line.partition(":")[0]: line.rpartition("largest error ")[2] for line in said.splitlines() if ": " in line
    }
    assert float(errors["row v"]) > 0 and {errors[f"{t} v"] for t in "cd"} == {"0.00e+00"}
    assert rows_of_state(tmp_path / "converted" / "best")["d"] == rows_of_state(run / "best")["d"]
    before, after = (tensors_of_state(one / "best", "tables/") for one in (run, tmp_path / "converted"))
    assert before == after and len(before) == 3
    script(
        "evaluate", tmp_path / "converted", "--output", tmp_path / "converted" / "evaluations" / "a", "--split", "valid"
    )


def test_warm_start_takes_the_tables_that_are_alike(ranks, run, data, tmp_path):
    more = ["trainer.max_steps=1", "optimizer.dense.lr=1e-30", f"trainer.warm_start.path={run}"]
    own = [*OWN, "embedding.tables.row.lr=1e-30", "embedding.tables.c.lr=1e-30", "embedding.tables.c.optimizer=sgd"]
    command = arguments(data, tmp_path / "run", *STEPS, *own, *more, "embedding.tables.d.dim=2")
    assert ranks.run(1, command, tmp_path / "output") == [0], (tmp_path / "output").read_text()
    said = (tmp_path / "output").read_text()
    assert "tables · kept: row, c · fresh: d · dropped: d · optimizer: row" in said
    assert "weights of tables · kept: others, row_v · fresh: d_v" in said
    before, after = newest(run), newest(tmp_path / "run")
    found, wanted = rows_of_state(after), rows_of_state(before)
    assert all(found["row"][i]["values"] == row["values"] for i, row in wanted["row"].items())
    name = "tables/projections.row_v.weight"
    assert tensors_of_state(after)[name] == tensors_of_state(before)[name]


def test_another_dim_does_not_go_on(ranks, run, data, tmp_path):
    command = arguments(data, run, *STEPS, *OWN, "trainer.resume=auto", "embedding.tables.row.dim=3")
    assert ranks.run(1, command, tmp_path / "output") == [2]
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert "found [2, 4] for tables/projections.row_v.weight; the model has [3, 4]" in last


def test_schedules_scale_the_rate_of_each_table(process):
    config = load_config(
        [
            "data=ml100k",
            "optimizer.sparse.name=rowwise_adagrad",
            "optimizer.sparse.lr=0.1",
            "optimizer.sparse.warmup_steps=4",
            "optimizer.plateau={factor: 0.5, floor: 0.0375}",
            "embedding.tables.user_id.lr=0.4",
            "embedding.tables.genre.lr=0.02",
            "embedding.tables.genre.pooled_output_dist=always",
        ],
        "",
    )
    model, _ = build_model(config, Schema(config.data.schema), process)
    optimizers = Optimizers(config.optimizer, model)

    def rates() -> dict[str, float]:
        kernels = model.module.tables._kernels()
        pairs = [pair for kernel in kernels for pair in zip(kernel.tables, kernel._optim.rates, strict=True)]
        return {table.config.name: rate for table, rate in pairs}

    def expect(user: float, genre: float, others: float) -> None:
        assert rates() == pytest.approx({name: others for name in rates()} | {"user_id": user, "genre": genre})
        assert optimizers.sparse_lr == pytest.approx(others)

    expect(0.1, 0.005, 0.025)
    for _ in range(3):
        optimizers.step()
    expect(0.4, 0.02, 0.1)
    optimizers.after_evaluation(1)
    expect(0.2, 0.02, 0.05)  # one that is below the floor stays
    optimizers.after_evaluation(1)
    expect(0.1, 0.02, 0.0375)
    optimizers.begin_anew()
    expect(0.1, 0.005, 0.025)
